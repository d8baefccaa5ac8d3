"""What fitting one optimizer took, and what it reports by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Fit", "SelectionRow", "fitted"]


@dataclass(frozen=True)
class Fit:
    """One optimizer and trial, trained to its end.

    Attributes:
        seconds: of all updates; NaN where the trial was not timed by itself.
        steps_per_second: of the median update.
        fit_seconds: of everything that the weights and the reported error took: noise model, every
            candidate and fold, their validation.
        passes: samples whose loss was differentiated, over all the training samples there are.
        samples: that the weights were fitted on; NaN before the end.
        step: whose weights are reported; None where the training curve picks it.
        error: that is reported; None where it is the training error of that step.
        lr: chosen among candidates; None where there were none.
        weight_decay: likewise.
    """

    seconds: float = math.nan
    steps_per_second: float = math.nan
    fit_seconds: float = math.nan
    passes: float = math.nan
    samples: float = math.nan
    step: int | None = None
    error: float | None = None
    lr: float | None = None
    weight_decay: float | None = None

    def figures(self) -> dict[str, float]:
        """Return the entries of ``summary.json``."""
        figures = {
            "seconds": self.seconds,
            "steps_per_second": self.steps_per_second,
            "fit_seconds": self.fit_seconds,
            "passes": self.passes,
            "samples": self.samples,
        }
        if self.lr is not None and self.weight_decay is not None:
            figures |= {"chosen_lr": self.lr, "chosen_weight_decay": self.weight_decay}
        return figures


def fitted(
    seconds: Sequence[float], setup: float, gradients: int, samples: int, step: int | None
) -> Fit:
    """Return what one training run on all training samples took.

    Args:
        seconds: of each update, one at least.
        setup: seconds of what came before the first.
        gradients: samples whose loss was differentiated.
        samples: number n of training samples.
        step: whose weights are reported; None where the training curve picks it.
    """
    return Fit(
        seconds=sum(seconds),
        steps_per_second=1 / median(seconds),
        fit_seconds=setup + sum(seconds),
        passes=gradients / samples,
        samples=samples,
        step=step,
    )


@dataclass(frozen=True)
class SelectionRow:
    """Validation of one candidate at one step; its fields are the columns of ``selection.csv``.

    Attributes:
        optimizer: its name.
        trial: which repetition, from 0.
        lr: learning rate of the candidate.
        weight_decay: of the candidate.
        step: updates made.
        validation_loss: mean over the samples held out, over folds where there are several.
        validation_error: fraction of them misclassified.
    """

    optimizer: str
    trial: int
    lr: float
    weight_decay: float
    step: int
    validation_loss: float
    validation_error: float
