"""The estimates that ``benchmarks/peers.py`` compares, each with the fit that it goes with.

A method fits the model of a problem, calls ``look`` with it at every record, and returns what it
estimates of that model's error on new data there, shape (records,).
"""

import copy
from collections.abc import Callable

import torch
from _path_risk import path_risk, probed_traces, traces
from _peer_problems import ADAMW_LR, Problem
from torch import Tensor, nn

import dd

FOLDS = 5
PROBES = 2

Look = Callable[[nn.Module], None]
See = Callable[[int, nn.Module, Tensor], None]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def gradient_descent(problem: Problem, look: Look) -> Tensor:
    """Plain gradient descent and its training error."""
    return _training_error(problem, _plain(problem), look)


def cross_validation(problem: Problem, look: Look) -> Tensor:
    """Plain gradient descent on all samples, and on all but a fold in turn."""
    found = torch.zeros(len(problem.records))
    for held, kept in folds(problem):

        def see(step: int, model: nn.Module, outputs: Tensor, held: Tensor = held) -> None:
            if step in problem.records:
                found[problem.records.index(step)] += _total(problem, model, held)

        _descend(problem, _plain(problem), see, kept)
    _descend(problem, _plain(problem), _at_records(problem, look))
    return found / len(problem.inputs)


def corrected_path(problem: Problem, look: Look) -> Tensor:
    """Plain gradient descent, its residuals kept and corrected afterwards."""
    residuals = _residuals(problem, look)
    found = traces(problem.inputs, problem.lr, problem.steps, problem.weight_decay)
    return path_risk(residuals, found)[list(problem.records)]


def probed_path(problem: Problem, look: Look) -> Tensor:
    """The same, with traces estimated by as few probes as in the authors' programs."""
    residuals = _residuals(problem, look)
    found = probed_traces(
        problem.inputs,
        problem.lr,
        problem.steps,
        problem.weight_decay,
        probes=PROBES,
        generator=problem.generator("probes"),
    )
    return path_risk(residuals, found)[list(problem.records)]


def _residuals(problem: Problem, look: Look) -> Tensor:
    found = torch.empty(problem.steps + 1, len(problem.inputs))
    shown = _at_records(problem, look)

    def see(step: int, model: nn.Module, outputs: Tensor) -> None:
        found[step] = (problem.targets - outputs)[:, 0]
        shown(step, model, outputs)

    _descend(problem, _plain(problem), see)
    return found


def decoupled(problem: Problem, look: Look) -> Tensor:
    """Decoupled descent and its training error; the noise's spectrum is fitted."""
    noise = dd.NoiseModel.fit(problem.inputs, problem.components)
    return _decoupled(problem, noise, problem.weight_decay, look)


def decoupled_isotropic(problem: Problem, look: Look) -> Tensor:
    """The same, told that the noise is isotropic."""
    noise = dd.NoiseModel.isotropic(problem.inputs, problem.components)
    return _decoupled(problem, noise, problem.weight_decay, look)


def adamw(problem: Problem, look: Look) -> Tensor:
    """Plain AdamW, at its own rate, and its training error."""
    return _training_error(problem, _adamw, look)


def decoupled_adamw(problem: Problem, look: Look) -> Tensor:
    """The same beside ``dd.decouple``, which is told the clusters, and the error that it tracks."""
    noise = dd.NoiseModel.fit(problem.inputs, problem.clusters)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = _adamw(model)
        dd.decouple(model, optimizer, noise=noise, seed=problem.seed)
        return optimizer

    return _training_error(problem, make, look)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=ADAMW_LR)


def decoupled_ridge(problem: Problem, look: Look) -> Tensor:
    """Decoupled descent to the same ridge regression as everyone's, by :func:`decay_of_ridge`."""
    noise = dd.NoiseModel.fit(problem.inputs, problem.components)
    decay = decay_of_ridge(problem.weight_decay, noise, len(problem.inputs))
    return _decoupled(problem, noise, decay, look)


def decay_of_ridge(penalty: float, noise: dd.NoiseModel, n: int) -> float:
    """Return the weight decay ω at which decoupled descent ends in the ridge of ``penalty``.

    At rest, with square loss, Xᵀ G/n + ωW = 0 and λ_b Q_b + ωQ_b = (ν_b λ_b/n) G at every bin b, so
    that G = XW + ΣQ_b − y is (XW − y)/(1 − c) with c = (1/n) Σ_b ν_b λ_b/(λ_b + ω), and W is the
    ridge regression of penalty ω(1 − c). (The loss there, ‖G‖²/n, is generalised cross-validation
    with the degrees of freedom that random-matrix theory predicts.)
    """
    eigenvalues, dimensions = noise.eigenvalues.double(), noise.multiplicities.double()

    def penalty_of(decay: float) -> float:
        share = (dimensions * eigenvalues / (eigenvalues + decay)).sum() / n
        return decay * (1 - float(share))

    # ω(1 − c) is at least ω − (1/n) Σ ν_b λ_b, and increasing where it is positive.
    low, high = 0.0, penalty + float((dimensions * eigenvalues).sum()) / n
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if penalty_of(middle) < penalty else (low, middle)
    return high


def folds(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """Return positions of the held-out and of the kept samples of each fold."""
    order = torch.randperm(len(problem.inputs), generator=problem.generator("folds"))
    parts = order.tensor_split(FOLDS)
    return [(part, torch.cat([other for other in parts if other is not part])) for part in parts]


def _plain(problem: Problem) -> Optimizer:
    return lambda model: torch.optim.SGD(
        model.parameters(), lr=problem.lr, weight_decay=problem.weight_decay
    )


def _decoupled(problem: Problem, noise: dd.NoiseModel, decay: float, look: Look) -> Tensor:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return dd.DecoupledDescent(
            model, lr=problem.lr, weight_decay=decay, noise=noise, seed=problem.seed
        )

    return _training_error(problem, make, look)


def _training_error(problem: Problem, make: Optimizer, look: Look) -> Tensor:
    found, shown = [], _at_records(problem, look)

    def see(step: int, model: nn.Module, outputs: Tensor) -> None:
        if step in problem.records:
            found.append(problem.errors(outputs, problem.targets).mean())
        shown(step, model, outputs)

    _descend(problem, make, see)
    return torch.stack(found)


def _descend(problem: Problem, make: Optimizer, see: See, rows: Tensor | None = None) -> None:
    """Train on the samples ``rows``, by default all; ``see`` every step's outputs before it."""
    inputs, targets = problem.inputs, problem.targets
    if rows is not None:
        inputs, targets = inputs[rows], targets[rows]
    model = copy.deepcopy(problem.model)
    optimizer = make(model)
    for step in range(problem.steps + 1):
        outputs = model(inputs)
        see(step, model, outputs.detach())
        if step < problem.steps:
            optimizer.zero_grad()
            problem.losses(outputs, targets).mean().backward()
            optimizer.step()


def _at_records(problem: Problem, look: Look) -> See:
    def see(step: int, model: nn.Module, outputs: Tensor) -> None:
        if step in problem.records:
            model.eval()
            look(model)
            model.train()

    return see


@torch.no_grad()
def _total(problem: Problem, model: nn.Module, rows: Tensor) -> float:
    return float(problem.errors(model(problem.inputs[rows]), problem.targets[rows]).sum())
