"""The loop whose cost is measured: the same network and data under SGD and decoupled descent."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spectrum_nodes import by_rank
from torch import Tensor, nn

import dd
from dd.noise.model import NoiseModel
from dd.noise.quadrature import nodes
from dd.support.fingerprint import fingerprint

CLASSES = 10
RATE = 0.05
NOISES = ("isotropic", "12 bins", "fitted")


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        n: training samples.
        d: inputs.
        k: hidden units.
        noise: one of ``NOISES``: one shadow a sample; twelve; or as many as ``NoiseModel.fit``
            takes for the spectrum of *12 bins*, λ_j ∝ 1/j.
        curvature: of decoupled descent.
        batch: samples of a step, or None for all.
        rule: SGD, for which decoupled descent knows its own response; or AdamW or Muon (with AdamW
            for all but the decoupled weight), followed by ``dd.decouple``.
    """

    n: int
    d: int
    k: int
    noise: str = "isotropic"
    curvature: str = "stein"
    batch: int | None = None
    rule: str = "SGD"

    def __str__(self) -> str:
        """One line."""
        batch = "full batch" if self.batch is None else f"batch {self.batch}"
        return (
            f"n={self.n} d={self.d} k={self.k} {batch}, {self.noise}, {self.curvature}, {self.rule}"
        )


@dataclass(frozen=True)
class Data:
    """Inputs, classes and what decoupled descent is told of them."""

    inputs: Tensor
    targets: Tensor
    noise: NoiseModel


def make_data(case: Case, device: str) -> Data:
    """Draw classes around means of their own; the spectrum of the noise is known, not estimated."""
    source = torch.Generator(device).manual_seed(0)
    targets = torch.randint(CLASSES, (case.n,), generator=source, device=device)
    means = torch.randn(CLASSES, case.d, generator=source, device=device) * 2 / case.d**0.5
    spectrum = torch.ones(case.d, dtype=torch.float64)
    if case.noise != "isotropic":
        spectrum = 1 / torch.arange(1, case.d + 1, dtype=torch.float64)
        spectrum /= spectrum.mean()
    inputs = torch.randn(case.n, case.d, generator=source, device=device)
    inputs.mul_(spectrum.sqrt().to(inputs))
    for rows in torch.arange(case.n, device=device).split(2**16):
        inputs[rows] += means[targets[rows]]
    values, sizes = _bins(case.noise, spectrum)
    noise = NoiseModel(
        values.to(inputs),
        sizes.to(inputs.device),
        components=targets if case.curvature == "stein" else None,
        fingerprints=None if case.batch is None else fingerprint(inputs),
    )
    return Data(inputs, targets, noise)


def _bins(noise: str, spectrum: Tensor) -> tuple[Tensor, Tensor]:
    d = len(spectrum)
    if noise == "isotropic":
        return spectrum.mean().reshape(1), torch.tensor([d])
    if noise == "fitted":
        return nodes(spectrum, most=12)
    values, sizes = by_rank(spectrum.numpy())
    return torch.from_numpy(values), torch.from_numpy(sizes)


def make_loop(kind: str, case: Case, data: Data) -> Callable[[], None]:
    """Return what makes one step of the README's loop, ``plain`` or by ``dd``."""
    torch.manual_seed(0)
    device = data.inputs.device
    model = nn.Sequential(nn.Linear(case.d, case.k), nn.GELU(), nn.Linear(case.k, CLASSES))
    model.to(device)
    optimizers = _optimizers(kind, case, data, model)
    batches = _batches(case, device)

    def step() -> None:
        inputs, targets = data.inputs, data.targets
        if batches is not None:
            rows = next(batches)
            inputs, targets = inputs[rows], targets[rows]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def _optimizers(
    kind: str, case: Case, data: Data, model: nn.Sequential
) -> list[torch.optim.Optimizer]:
    if case.rule == "SGD":
        if kind == "plain":
            return [torch.optim.SGD(model.parameters(), lr=RATE)]
        settings = {"noise": data.noise, "curvature": case.curvature}
        return [dd.DecoupledDescent(model, lr=RATE, **settings)]
    first, *rest = model.parameters()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([first, *rest], lr=1e-3)]
    if case.rule == "Muon":
        optimizers = [torch.optim.Muon([first], lr=0.02), torch.optim.AdamW(rest, lr=1e-3)]
    if kind == "dd":
        dd.decouple(model, *optimizers, noise=data.noise, curvature=case.curvature)
    return optimizers


def _batches(case: Case, device: torch.device):
    if case.batch is None:
        return None

    def endless():
        source = torch.Generator().manual_seed(1)
        while True:
            order = torch.randperm(case.n, generator=source)
            yield from (rows.to(device) for rows in order.split(case.batch) if len(rows) > 1)

    return endless()
