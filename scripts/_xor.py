"""The XOR problem that the figures are of: data, start, optimizers, theory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import dd
from dd.data import Split, xor
from dd.data.seeding import generator
from dd.experiments.models import informed_two_layer
from dd.theory.state_evolution import StateEvolution

# ρ of every decoupled optimizer.
DAMPING = {"dd": 1.0, "dd_half": 0.5, "dd_pure": 0.0}
WIDTH = 8


@dataclass(frozen=True)
class Xor:
    """Four clusters, a network of eight GELU units, and a start that knows a little of the means.

    Attributes:
        dimension: d.
        alpha: n/d.
        separation: norm of the cluster means.
        num_test: test samples.
        lr: learning rate of every optimizer.
        steps: updates.
        record_every: updates between two records.
    """

    dimension: int
    alpha: float = 4.0
    separation: float = 2.5
    num_test: int = 5000
    lr: float = 0.25
    steps: int = 200
    record_every: int = 5

    @property
    def num_train(self) -> int:
        """Number n of training samples."""
        return max(1, round(self.alpha * self.dimension))

    def split(self, seed: int) -> Split:
        """Draw the data of a trial."""
        return xor(
            dimension=self.dimension,
            num_train=self.num_train,
            num_test=self.num_test,
            separation=self.separation,
            seed=seed,
        )

    def model(self, seed: int, split: Split) -> nn.Sequential:
        """Draw the start of a trial; head and overlaps are alike in all of them."""
        return informed_two_layer(
            split.dimension,
            WIDTH,
            2,
            mixture=split.mixture,
            overlap=0.5,
            hidden_scale=0.5,
            generator=generator(seed, "initialisation"),
        )

    def trials(
        self, names: Sequence[str], seeds: Sequence[int], *, progress: bool = True
    ) -> dd.Trials:
        """Train by plain gradient descent ("gd") and by the optimizers of :data:`DAMPING`."""
        return dd.run_trials(
            self.split,
            self.model,
            {name: _optimizer(name, self.lr) for name in names},
            seeds=seeds,
            steps=self.steps,
            record_every=self.record_every,
            noise=noise,
            progress=progress,
        )

    def theory(
        self,
        seeds: Sequence[int],
        *,
        damping: float = 1.0,
        paths: int = 2500,
        error: Callable[[Tensor, Tensor], Tensor] | None = None,
        progress: bool = True,
    ) -> StateEvolution:
        """State evolution of decoupled descent from the trials' own starts.

        Args:
            seeds: of the trials; one simulation each.
            damping: ρ.
            paths: of each simulation.
            error: as of ``dd.state_evolution``.
            progress: whether to show a bar.
        """
        split = self.split(seeds[0])
        starts = iter(seeds)
        return dd.state_evolution(
            # Only inner products count, so that all starts may be drawn around the same means.
            lambda _: self.model(next(starts), split),
            split.mixture,
            alpha=self.num_train / self.dimension,
            steps=self.steps,
            lr=self.lr,
            damping=damping,
            error=error,
            paths=paths * len(seeds),
            replicates=len(seeds),
            record_every=self.record_every,
            seed=seeds[0],
            progress=progress,
        )


def repetitions(trials: int, largest: int, n: int) -> int:
    """Trials of size n that hold as many samples in all as so many of the largest size."""
    return trials * largest // n


def noise(split: Split) -> dd.NoiseModel:
    """Isotropic noise around the known clusters."""
    return dd.NoiseModel.isotropic(split.train_inputs, split.train_components)


def _optimizer(name: str, lr: float) -> Callable[..., torch.optim.Optimizer]:
    if name == "gd":
        return partial(torch.optim.SGD, lr=lr)
    return partial(dd.DecoupledDescent, lr=lr, damping=DAMPING[name])
