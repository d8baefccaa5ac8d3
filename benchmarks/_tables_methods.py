"""The methods of ``benchmarks/tables.py``: each trains one network and reports an error."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from _tables_data import Split
from torch import Tensor, nn

import dd

WIDTH, LR, MOMENTUM, STEPS = 16, 0.05, 0.9, 150
AUTO_STEPS = 100
FOLDS = 5
LOOK_EVERY = 5
CONFIDENCE = 0.9


@dataclass
class Report:
    """What a method says of its network, and what is true of it on the test part.

    Attributes:
        reported: the error it reports.
        lower: lower end of the interval.
        upper: upper end of the interval.
        test: error on the test part.
        best: lowest error on the test part of all moments looked at, where they were.
        seconds: all that takes, looks at the test part left out.
    """

    reported: float
    lower: float
    upper: float
    test: float
    seconds: float
    best: float | None = None


@dataclass
class _Watch:
    """Seconds, but for those in which it stands still."""

    started: float = field(default_factory=time.perf_counter)
    lost: float = 0.0

    @contextmanager
    def still(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.lost += time.perf_counter() - begun

    def read(self) -> float:
        return time.perf_counter() - self.started - self.lost


def gradient_descent(split: Split, seed: int, steps: int = STEPS) -> Report:
    """Plain SGD: its training error, as if the samples were new."""
    watch, looks = _Watch(), []
    model = network(split, seed)

    def look(step: int) -> None:
        if step % LOOK_EVERY == 0 or step == steps:
            with watch.still():
                looks.append(error_on_test_part(model, split))

    _descend(model, _sgd(model), split.X, split.y, steps, look)
    wrong = int(_wrong(model, split.X, split.y).sum())
    seconds = watch.read()
    return Report(*_binomial(wrong, len(split.y)), looks[-1], seconds, min(looks))


def decoupled(split: Split, seed: int, steps: int = STEPS) -> Report:
    """Decoupled descent that knows of the classes."""
    return _decoupled(split, seed, steps, classes=True)


def decoupled_bare(split: Split, seed: int, steps: int = STEPS) -> Report:
    """Decoupled descent without a noise model."""
    return _decoupled(split, seed, steps, classes=False)


def decoupled_auto(split: Split, seed: int, steps: int = AUTO_STEPS) -> Report:
    """Decoupled descent that chooses rate and end by itself."""
    watch = _Watch()
    model = network(split, seed)
    noise = dd.NoiseModel.fit(split.X, split.y)
    optimizer = dd.DecoupledDescent(model, lr="auto", stop="auto", noise=noise)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(split.X), split.y)
        loss.backward()
        return loss

    for _ in range(min(steps, AUTO_STEPS)):
        optimizer.step(closure)
        if optimizer.stopped:
            break
    return _estimated(optimizer, model, split, watch)


def cross_validation(split: Split, seed: int, steps: int = STEPS) -> Report:
    """Plain SGD once without each fifth of the samples, and once on all."""
    watch, wrong = _Watch(), 0
    # The samples are in random order already.
    fold = torch.arange(len(split.y)) % FOLDS
    for left_out in range(FOLDS):
        rest, held = fold != left_out, fold == left_out
        model = network(split, seed)
        _descend(model, _sgd(model), split.X[rest], split.y[rest], steps)
        wrong += int(_wrong(model, split.X[held], split.y[held]).sum())
    model = network(split, seed)
    _descend(model, _sgd(model), split.X, split.y, steps)
    seconds = watch.read()
    return Report(*_binomial(wrong, len(split.y)), error_on_test_part(model, split), seconds)


METHODS: Mapping[str, Callable[..., Report]] = {
    "gd": gradient_descent,
    "dd": decoupled,
    "dd_none": decoupled_bare,
    "dd_auto": decoupled_auto,
    "cv5": cross_validation,
}
LABELS = {
    "gd": "GD: training error",
    "dd": "DD: tracked",
    "dd_none": "DD, no noise model: tracked",
    "dd_auto": 'DD, lr="auto": tracked',
    "cv5": "GD: 5-fold cross-validation",
}
# Those whose word is put to the test.
ESTIMATES = ("dd", "dd_none", "dd_auto")


def measure(name: str, split: Split, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Return what a method reports, and of which kinds the library's warnings were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = METHODS[name](split, seed, steps)
    kinds = {given.category for given in caught}
    warned = sorted(kind.__name__ for kind in kinds if kind.__module__.split(".")[0] == "dd")
    return vars(report) | {"warned": warned}


def network(split: Split, seed: int) -> nn.Sequential:
    """Return the network that all methods train, in its initial state."""
    torch.manual_seed(seed)
    inputs = split.X.shape[1]
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, split.classes))


def error_on_test_part(model: nn.Module, split: Split) -> float:
    """Return the share of the test part that a model gets wrong; it is left in its mode."""
    training = model.training
    model.eval()
    found = float(_wrong(model, split.test_X, split.test_y).float().mean())
    model.train(training)
    return found


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def _decoupled(split: Split, seed: int, steps: int, *, classes: bool) -> Report:
    watch = _Watch()
    model = network(split, seed)
    noise = dd.NoiseModel.fit(split.X, split.y) if classes else None
    optimizer = dd.DecoupledDescent(model, lr=LR, momentum=MOMENTUM, noise=noise)
    _descend(model, optimizer, split.X, split.y, steps)
    return _estimated(optimizer, model, split, watch)


def _estimated(
    optimizer: dd.DecoupledDescent, model: nn.Module, split: Split, watch: _Watch
) -> Report:
    found = optimizer.estimate(
        [0], lambda _: (model(split.X).argmax(1) != split.y).float(), CONFIDENCE
    )
    seconds = watch.read()
    told = (float(number) for number in (found.value, found.lower, found.upper))
    return Report(*told, error_on_test_part(model, split), seconds)


def _descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    X: Tensor,
    y: Tensor,
    steps: int,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    for step in range(steps):
        look(step)
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    look(steps)


@torch.no_grad()
def _wrong(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    return model(X).argmax(1) != y


def _binomial(wrong: int, n: int) -> tuple[float, float, float]:
    """The share of errors, and Wilson's interval of as many independent samples."""
    z, mean = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), wrong / n
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return mean, centre - half, centre + half
