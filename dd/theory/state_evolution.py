"""The losses and errors that decoupled descent has in the limit of many samples and inputs."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd.support.checks import check_count
from dd.support.progress import progress_bar
from dd.theory.mean_field import MeanField, Snapshot, Training
from dd.theory.mixture import GaussianMixture

__all__ = ["MonteCarlo", "StateEvolution", "state_evolution"]

Loss = Callable[[Tensor, Tensor], Tensor]
Models = nn.Module | Callable[[torch.Generator], nn.Module]


@dataclass(frozen=True, eq=False, repr=False)
class MonteCarlo:
    """A quantity found by several independent simulations.

    Attributes:
        values: one of each simulation, shape (replicates, ...).

    Example:
        >>> from dd.theory.state_evolution import MonteCarlo
        >>> loss = MonteCarlo(torch.tensor([[0.7, 0.5], [0.7, 0.3]]))  # two simulations, two steps
        >>> loss.mean, loss.standard_error
        (tensor([0.7000, 0.4000]), tensor([0.0000, 0.1000]))
    """

    values: Tensor

    def __repr__(self) -> str:
        """How many simulations of what shape."""
        count, *shape = self.values.shape
        return f"MonteCarlo({count} simulations of shape {tuple(shape)}: .mean, .standard_error)"

    @property
    def mean(self) -> Tensor:
        """Mean over the simulations."""
        return self.values.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of :attr:`mean`; NaN of a single simulation."""
        count = len(self.values)
        if count == 1:
            return torch.full_like(self.values[0], math.nan)
        return self.values.std(0) / count**0.5


@dataclass(frozen=True, eq=False, repr=False)
class StateEvolution:
    """Predicted curves at T recorded steps; all tensors float64 on the CPU.

    Attributes:
        steps: updates made so far, shape (T,).
        loss: training = test loss, shape (T,).
        error: training = test error, shape (T,).
        overlaps: M, mean of the pre-activation (bias not counted in) of each of the A components,
            shape (T, A, k).
        covariance: K, covariance of the pre-activation within components, shape (T, k, k).

    Example:
        >>> mixture = dd.GaussianMixture(1.5 * torch.eye(2, 50), targets=torch.arange(2))
        >>> predicted = dd.state_evolution(model, mixture, alpha=10, steps=3, lr=0.5, paths=200)
        >>> predicted.steps.tolist(), predicted.covariance.mean.shape
        ([0, 1, 2, 3], torch.Size([4, 4, 4]))
    """

    steps: Tensor
    loss: MonteCarlo
    error: MonteCarlo
    overlaps: MonteCarlo
    covariance: MonteCarlo

    def __repr__(self) -> str:
        """The curves' ends."""
        ends = ", ".join(
            f"{name} {float(curve.mean[0]):.4f} to {float(curve.mean[-1]):.4f} ± "
            f"{float(curve.standard_error[-1]):.4f}"
            for name, curve in (("loss", self.loss), ("error", self.error))
        )
        first, last = int(self.steps[0]), int(self.steps[-1])
        return f"StateEvolution(steps {first} to {last}: {ends}; .overlaps, .covariance)"


def state_evolution(
    model: Models,
    mixture: GaussianMixture,
    loss: Loss = F.cross_entropy,
    *,
    alpha: float,
    steps: int,
    lr: float | Callable[[int], float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    damping: float = 1.0,
    layer: nn.Module | str | None = None,
    error: Callable[[Tensor, Tensor], Tensor] | None = None,
    paths: int = 20_000,
    replicates: int = 8,
    record_every: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> StateEvolution:
    """Predict the training = test loss and error of full-batch decoupled descent.

    As n, d → ∞ at a fixed ratio α = n/d the decoupled layer's pre-activation of a fresh sample is,
    given its component, Gaussian over all steps jointly, with means M and covariances K that follow
    from those before by a recursion of k × k matrices (section 9 of ``docs/theory.md``). This
    samples such paths, and trains the other parameters on them.

    It predicts decoupled descent alone. What plain gradient descent does is *not* predicted,
    neither its training nor its test loss: its weights depend on the samples' own noise, and its
    pre-activations are not Gaussian.

    Only inner products of the initial weights and the means enter, so that any coordinates will do
    in which these are right: to start from given overlaps, choose means in a few dimensions and a
    layer of as many inputs. (Of several bins ν_b/d enter too.)

    Args:
        model: with its initial weights; or a function of a CPU generator that draws one, called
            for every simulation: curves are then means over the law of the initialisation. The
            inputs may be used by the decoupled layer alone.
        mixture: law of the inputs. Of several bins it is in the eigenbasis of Σ, and so must the
            weights of the decoupled layer be.
        loss: of outputs and targets, the mean over samples of each one's own; differentiable once.
        alpha: α = n/d, training samples per input.
        steps: number of updates.
        lr: learning rate, or a function of the number of updates made.
        momentum: as in ``torch.optim.SGD``, like the three that follow.
        dampening: of the momentum.
        weight_decay: coupled L2 penalty of all parameters.
        nesterov: whether momentum is Nesterov's.
        damping: ρ in [0, 1], as of :class:`dd.DecoupledDescent`; below 1 for isotropic noise only.
        layer: the decoupled layer or its name; by default the first trainable ``nn.Linear``.
        error: of outputs and targets, returns each sample's error, shape (N,); by default whether
            the class of highest score is another than an integer target, and NaN where targets are
            no integers.
        paths: sampled paths in all.
        replicates: independent simulations that share them, whose spread gives the Monte-Carlo
            standard error. Each has a bias of order replicates/paths.
        record_every: updates between two recorded steps; the last is recorded in any case.
        seed: of the paths; the global generators are left alone.
        dtype: of the paths, float32 or float64.
        device: where to compute; by default CUDA where there is one.
        progress: whether to show a progress bar (needs rich).

    Raises:
        TypeError: if the mixture or the model is of another kind.
        ValueError: if an argument is out of range, the loss is no mean over samples, or the model
            does not fit the mixture, changes its inputs before the decoupled layer or uses them
            elsewhere, uses the decoupled weight elsewhere, or has dropout.
        FloatingPointError: if the loss or a gradient is not finite.

    Example:
        >>> mixture = dd.GaussianMixture(3.0 * torch.eye(2, 50), targets=torch.arange(2))
        >>> predicted = dd.state_evolution(model, mixture, alpha=10, steps=5, lr=0.5, paths=800)
        >>> bool(predicted.error.mean[-1] < predicted.error.mean[0])
        True
    """
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"state_evolution: expected a dd.GaussianMixture, got {type(mixture)}")
    if not callable(model):
        raise TypeError(
            "state_evolution: expected a module or a function of a generator that returns one, got "
            f"{type(model)}"
        )
    check_count("state_evolution: replicates", replicates)
    check_count("state_evolution: paths", paths, least=2 * replicates * len(mixture.means))
    check_count("state_evolution: record_every", record_every)
    check_count("state_evolution: seed", seed, least=0)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"state_evolution: dtype must be torch.float32 or torch.float64, got {dtype}"
        )
    training = Training(
        mixture=mixture,
        loss=loss,
        error=error,
        alpha=alpha,
        steps=steps,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        damping=damping,
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recorded = sorted({*range(0, steps, record_every), steps})
    runs = []
    with progress_bar("state evolution", replicates * (steps + 1), show=progress) as advance:
        for replicate in range(replicates):
            # A seed of its own for every pair, as NumPy's spawned sequences have.
            (drawn,) = np.random.SeedSequence((seed, replicate)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(drawn))
            own = copy.deepcopy(model if isinstance(model, nn.Module) else model(generator))
            system = MeanField(
                training, own.to(device, dtype), layer, paths // replicates, generator
            )
            runs.append(_snapshots(system, training, recorded, advance))
    return _collected(recorded, runs)


def _snapshots(
    system: MeanField, training: Training, recorded: Sequence[int], advance: Callable[[int], None]
) -> list[Snapshot]:
    """Simulate one training run and keep the recorded steps."""
    kept = []
    for step in range(training.steps + 1):
        snapshot = system.look(step)
        if step in recorded:
            kept.append(snapshot)
        if step < training.steps:
            system.move(step)
        advance(1)
    return kept


def _collected(recorded: Sequence[int], runs: Sequence[Sequence[Snapshot]]) -> StateEvolution:
    def stacked(name: str) -> MonteCarlo:
        rows = [
            [torch.as_tensor(getattr(s, name), dtype=torch.float64) for s in run] for run in runs
        ]
        return MonteCarlo(torch.stack([torch.stack(row) for row in rows]).double().cpu())

    return StateEvolution(
        torch.tensor(recorded),
        stacked("loss"),
        stacked("error"),
        stacked("overlaps"),
        stacked("covariance"),
    )
