"""What many trials have shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["METRICS", "Doubt", "Failure", "Trials"]

METRICS = (
    "train_loss",
    "test_loss",
    "train_error",
    "test_error",
    "uncorrected_train_loss",
    "uncorrected_train_error",
)


class Failure(NamedTuple):
    """A trial whose training loss turned non-finite.

    Attributes:
        name: of the optimizer.
        seed: of the trial.
        step: number of updates after which it was first seen.
    """

    name: str
    seed: int
    step: int


class Doubt(NamedTuple):
    """A trial whose training error is not to be believed: its shadows outgrew the theory.

    Attributes:
        name: of the optimizer.
        seed: of the trial.
        step: of the first record that shows it.
        share: the size of the shadows there, over that of the pre-activations.
    """

    name: str
    seed: int
    step: int
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Trials:
    """What trials have shown.

    Attributes:
        seeds: of the trials.
        steps: number of updates before each record, shape (records,), int64.
        metrics: for every optimizer its losses and errors by the names in :data:`METRICS`, each of
            shape (trials, records), float64, on the CPU; not a number from where a trial has
            failed. The training figures are the corrected ones under decoupled descent.
        weights: for every optimizer the last parameters by their name in the model, each of shape
            (trials, ...), on the CPU.
        failures: the trials that turned non-finite.
        seconds: spent on updates, of all trials and optimizers together.
        doubts: the trials whose training error is not to be believed.

    Example:
        >>> from functools import partial
        >>> from dd.data import xor
        >>> from dd.experiments.models import two_layer
        >>> trials = dd.run_trials(
        ...     lambda seed: xor(dimension=20, num_train=200, num_test=200, seed=seed),
        ...     lambda seed, split: two_layer(20, 4, 2),
        ...     {"gd": partial(torch.optim.SGD, lr=0.5)},
        ...     seeds=range(2),
        ...     steps=3,
        ... )
        >>> trials.seeds, trials.steps.tolist(), trials.failures
        ((0, 1), [0, 1, 2, 3], ())
        >>> trials.metrics["gd"]["test_error"].shape
        torch.Size([2, 4])
    """

    seeds: tuple[int, ...]
    steps: Tensor
    metrics: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]
    failures: tuple[Failure, ...]
    seconds: float
    doubts: tuple[Doubt, ...] = ()

    def __repr__(self) -> str:
        """How many trials, and the mean test error of each optimizer at the end."""
        ends = ", ".join(
            f"{name} {float(found['test_error'][:, -1].nanmean()):.4f}"
            for name, found in self.metrics.items()
        )
        failed = f"; {len(self.failures)} failed" if self.failures else ""
        if self.doubts:
            failed += f"; {len(self.doubts)} not to be believed"
        return (
            f"Trials({len(self.seeds)} trials of {int(self.steps[-1])} steps; mean test error at "
            f"the end: {ends}{failed}; .metrics, .weights)"
        )

    @classmethod
    def joined(cls, parts: Sequence["Trials"]) -> "Trials":
        """Put the trials of several chunks together, in their order.

        Raises:
            ValueError: if there are none, or they were recorded at other steps or of other
                optimizers.

        Example:
            >>> from functools import partial
            >>> from dd.data import xor
            >>> from dd.experiments.models import two_layer
            >>> some, others = (
            ...     dd.run_trials(
            ...         lambda seed: xor(dimension=20, num_train=200, num_test=200, seed=seed),
            ...         lambda seed, split: two_layer(20, 4, 2),
            ...         {"gd": partial(torch.optim.SGD, lr=0.5)},
            ...         seeds=seeds,
            ...         steps=3,
            ...     )
            ...     for seeds in ([0, 1], [2])
            ... )
            >>> dd.Trials.joined([some, others]).seeds
            (0, 1, 2)
        """
        if not parts:
            raise ValueError("Trials: nothing to join, got no parts")
        first = parts[0]
        for part in parts:
            if (
                not torch.equal(part.steps, first.steps)
                or part.metrics.keys() != first.metrics.keys()
            ):
                raise ValueError(
                    "Trials: only trials of the same optimizers and recorded steps can be joined, "
                    f"got {list(first.metrics)} at {len(first.steps)} steps and "
                    f"{list(part.metrics)} at {len(part.steps)}"
                )
        return cls(
            seeds=tuple(seed for part in parts for seed in part.seeds),
            steps=first.steps,
            metrics=_joined([part.metrics for part in parts]),
            weights=_joined([part.weights for part in parts]),
            failures=tuple(failure for part in parts for failure in part.failures),
            seconds=sum(part.seconds for part in parts),
            doubts=tuple(doubt for part in parts for doubt in part.doubts),
        )


def _joined(parts: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: torch.cat([part[name][key] for part in parts]) for key in tensors}
        for name, tensors in parts[0].items()
    }
