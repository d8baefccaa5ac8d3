"""Data and models of ``benchmarks/peers.py``, and the error that each model really has."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd.data import generator, xor
from dd.experiments.models import two_layer

NOISE = 0.5  # standard deviation of the targets around xᵀβ; ‖β‖ is about 1
SEPARATION = 1.5  # norm of ±μ, the means of the two classes of the logistic model
TEST_SAMPLES = 20_000  # of the network, whose error has no closed form
WIDTH = 8
ADAMW_LR = 0.003

PerSample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One data set, the model that is fitted to it, and how.

    Attributes:
        inputs: shape (n, d).
        targets: shape (n, 1); (n,) of the network.
        components: mixture component of each sample, shape (n,), where there are any.
        model: at its initial weights; to be copied.
        losses: what is descended, of outputs and targets, shape (n,).
        errors: what is to be estimated, of the same.
        truth: mean of the errors of a model on new data.
        lr: learning rate.
        weight_decay: of the loss of *mean* over samples.
        steps: updates.
        records: steps at which the error is estimated.
        square: whether errors are squared residuals, of which distances are relative.
        clusters: the same, of the network, for those alone that are told; nobody would know them.
        num_test: samples behind ``truth``, infinite where it is exact.
        seed: of everything random.
    """

    inputs: Tensor
    targets: Tensor
    components: Tensor | None
    model: nn.Sequential
    losses: PerSample
    errors: PerSample
    truth: Callable[[nn.Module], float]
    lr: float
    steps: int
    records: tuple[int, ...]
    square: bool
    weight_decay: float = 0.0
    clusters: Tensor | None = None
    num_test: float = math.inf
    seed: int = field(kw_only=True)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a source of random numbers of its own for every purpose."""
        return generator(self.seed, purpose)

    def floor(self, truth: float) -> float:
        """Return the mean distance from ``truth`` of the average over n samples that are new.

        Of a mean of squared Gaussian residuals relative to it, and of a rate of errors.
        """
        variance = 2.0 if self.square else truth * (1 - truth)
        inverse = 1 / len(self.inputs) + 1 / self.num_test
        return math.sqrt(2 / math.pi * variance * inverse)


def linear(
    d: int,
    seed: int,
    *,
    ratio: float = 2.0,
    spread: float = 1.0,
    weight_decay: float = 0.0,
    at_end: bool = False,
    lr: float = 0.1,
    steps: int = 200,
) -> Problem:
    """Linear targets xᵀβ + noise, square loss, from zero.

    Args:
        d: dimension of the inputs.
        seed: of the data.
        ratio: n/d.
        spread: the eigenvalues of the covariance are spaced geometrically from 1/spread to spread,
            then scaled to a mean of 1.
        weight_decay: ridge penalty.
        at_end: whether only the last iterate's error is to be estimated.
        lr: learning rate.
        steps: updates.
    """
    source, n = generator(seed, "data/linear"), round(ratio * d)
    variances = torch.logspace(math.log10(spread), -math.log10(spread), d)
    variances /= variances.mean()
    beta = torch.randn(d, generator=source) / math.sqrt(d)
    inputs = torch.randn(n, d, generator=source) * variances.sqrt()
    targets = inputs @ beta + NOISE * torch.randn(n, generator=source)
    return Problem(
        inputs=inputs,
        targets=targets[:, None],
        components=None,
        model=_flat(d),
        losses=lambda outputs, targets: 0.5 * (outputs - targets).square()[:, 0],
        errors=lambda outputs, targets: (outputs - targets).square()[:, 0],
        truth=partial(_linear_truth, beta=beta, variances=variances),
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        records=(steps,) if at_end else _along(steps),
        square=True,
        seed=seed,
    )


def logistic(d: int, seed: int, *, weight_decay: float, steps: int = 200) -> Problem:
    """Two Gaussian classes around ±μ, n = 2d, logistic loss with a ridge, to its minimum."""
    source, n = generator(seed, "data/logistic"), 2 * d
    mean = torch.randn(d, generator=source)
    mean *= SEPARATION / mean.norm()
    classes = torch.randint(2, (n,), generator=source)
    signs = 2.0 * classes[:, None] - 1
    return Problem(
        inputs=torch.randn(n, d, generator=source) + signs * mean,
        targets=signs,
        components=classes,
        model=_flat(d),
        losses=lambda outputs, signs: F.softplus(-signs * outputs)[:, 0],
        errors=lambda outputs, signs: (signs * outputs <= 0).float()[:, 0],
        truth=partial(_logistic_truth, mean=mean),
        lr=2.0,
        weight_decay=weight_decay,
        steps=steps,
        records=(steps,),
        square=False,
        seed=seed,
    )


def network(d: int, seed: int, *, steps: int = 200) -> Problem:
    """XOR of four clusters, n = 2d, two layers, cross-entropy."""
    split = xor(dimension=d, num_train=2 * d, num_test=TEST_SAMPLES, seed=seed)
    return Problem(
        inputs=split.train_inputs,
        targets=split.train_targets,
        # As in ``experiment=xor``, nobody tells which cluster a sample came from.
        components=None,
        clusters=split.train_components,
        model=two_layer(d, WIDTH, 2, hidden_scale=0.5, generator=generator(seed, "initialisation")),
        losses=partial(F.cross_entropy, reduction="none"),
        errors=_wrong,
        truth=partial(_measured, inputs=split.test_inputs, targets=split.test_targets),
        lr=0.25,
        steps=steps,
        records=_along(steps),
        square=False,
        num_test=TEST_SAMPLES,
        seed=seed,
    )


def _along(steps: int) -> tuple[int, ...]:
    """Twenty steps of the path, the start left out: there nothing has been fitted yet."""
    every = max(1, steps // 20)
    return tuple(range(every, steps + 1, every))


def _flat(d: int) -> nn.Sequential:
    layer = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer)


def _linear_truth(model: nn.Module, beta: Tensor, variances: Tensor) -> float:
    weight = next(model.parameters()).detach()[0]
    return float((variances * (weight - beta).square()).sum()) + NOISE**2


def _logistic_truth(model: nn.Module, mean: Tensor) -> float:
    weight = next(model.parameters()).detach()[0]
    margin = float(weight @ mean / weight.norm())
    return 0.5 * math.erfc(margin / math.sqrt(2))


def _wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).float()


@torch.no_grad()
def _measured(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return float(_wrong(model(inputs), targets).mean())


PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    "linear": linear,
    "linear_anisotropic": partial(linear, spread=10.0),
    "linear_few": partial(linear, ratio=0.5),
    # Twice the growth rate √(d/n) − 1 of decoupled descent at n < d.
    "linear_few_decay": partial(linear, ratio=0.5, weight_decay=2 * (math.sqrt(2) - 1)),
    "ridge": partial(linear, weight_decay=0.1, at_end=True, lr=0.3),
    "logistic": partial(logistic, weight_decay=0.03),
    "network": network,
}
