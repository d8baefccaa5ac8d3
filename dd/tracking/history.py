"""What a run records: the history, its csv file and its summary."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.support.files import write_rows

__all__ = [
    "COLUMNS",
    "METRICS",
    "Array",
    "History",
    "Record",
    "aggregate",
    "selected_step",
    "summarise",
]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """Losses and errors before one step; its fields are the columns of ``history.csv``.

    Attributes:
        optimizer: name of the optimizer, "gd", "dd" or "dd_auto".
        trial: which repetition, from 0.
        step: updates made so far.
        train_loss: mean training loss, at the corrected pre-activations where there are any.
        test_loss: mean test loss.
        train_error: fraction of training samples misclassified, corrected likewise.
        test_error: fraction of test samples misclassified.
        uncorrected_train_loss: mean training loss of the plain network.
        uncorrected_train_error: training error of the plain network.
    """

    optimizer: str
    trial: int
    step: int
    train_loss: float
    test_loss: float
    train_error: float
    test_error: float
    uncorrected_train_loss: float
    uncorrected_train_error: float


COLUMNS: tuple[str, ...] = tuple(column.name for column in fields(Record))
# Figures that not every trial has.
TIMES = ("seconds", "steps_per_second", "fit_seconds")
METRICS: tuple[str, ...] = COLUMNS[3:]


@dataclass
class History:
    """All records of a run, in the order in which they were made.

    Attributes:
        records: the records.
        completed: optimizers and trials that were trained to their end.
    """

    records: list[Record] = field(default_factory=list)
    completed: set[tuple[str, int]] = field(default_factory=set)

    def append(self, record: Record) -> None:
        """Add one record."""
        self.records.append(record)

    @property
    def optimizers(self) -> list[str]:
        """Names of the optimizers, in order of appearance."""
        return list(dict.fromkeys(record.optimizer for record in self.records))

    def trials(self, optimizer: str) -> list[int]:
        """Return the trials recorded for an optimizer, in order of appearance."""
        return list(dict.fromkeys(r.trial for r in self.records if r.optimizer == optimizer))

    def select(self, optimizer: str, trial: int) -> list[Record]:
        """Return the records of one optimizer and trial.

        Raises:
            KeyError: if there are none.
        """
        found = [r for r in self.records if r.optimizer == optimizer and r.trial == trial]
        if not found:
            have = ", ".join(f"{name}: {self.trials(name)}" for name in self.optimizers)
            raise KeyError(
                f"no records of {optimizer!r}, trial {trial}; there are {have or 'none'}"
            )
        return found

    def curve(self, optimizer: str, trial: int, column: str) -> tuple[Array, Array]:
        """Return the steps and one column of one optimizer and trial, each of shape (records,).

        Raises:
            KeyError: if there are no such records or no such column.
        """
        _check_column(column)
        found = self.select(optimizer, trial)
        return _column(found, "step"), _column(found, column)

    def curves(self, optimizer: str, column: str) -> tuple[Array, Array]:
        """Return one column of every trial of an optimizer on common steps.

        Returns:
            The steps recorded in any trial, shape (records,), ascending, and the values, shape
            (trials, records): between two records of a trial on the line between them; after the
            last one where a completed trial came to rest, and NaN where it broke off.

        Raises:
            KeyError: if there are no such records or no such column.
        """
        _check_column(column)
        trials: dict[int, list[Record]] = {}
        for record in self.records:
            if record.optimizer == optimizer:
                trials.setdefault(record.trial, []).append(record)
        if not trials:
            raise KeyError(f"no records of {optimizer!r}; there are {self.optimizers}")
        single = {t: (_column(own, "step"), _column(own, column)) for t, own in trials.items()}
        steps = np.unique(np.concatenate([own for own, _ in single.values()]))
        values = np.empty((len(single), len(steps)))
        for row, (trial, (own, recorded)) in zip(values, single.items(), strict=True):
            rests = (optimizer, trial) in self.completed
            row[:] = np.interp(steps, own, recorded, right=None if rests else np.nan)
            row[np.searchsorted(steps, own)] = recorded
        return steps, values

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write every record, floats to their last digit, whole or not at all."""
        write_rows(path, self.records, COLUMNS)


def selected_step(records: Sequence[Record]) -> int:
    """Return the step that the training curve alone would pick.

    It is the first of lowest training error, and of lowest training loss among equals. The error
    comes first because it is what is reported; the loss goes on falling with a head that over-fits.

    Raises:
        ValueError: if there are no records.
    """
    return _lowest(records, "train_error", "train_loss").step


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Return the figures of ``summary.json`` for one optimizer and trial.

    Gaps are means over the records of |train - test|; they are NaN once a curve is. Steps are the
    updates made up to the last record. Without a test set its figures are NaN.

    Raises:
        ValueError: if there are no records, or records of more than one optimizer or trial.
    """
    if len({(r.optimizer, r.trial) for r in records}) > 1:
        raise ValueError("summarise takes the records of one optimizer and trial: use select first")
    best = _lowest(records, "test_error")
    chosen = selected_step(records)
    last = records[-1]
    return {
        "steps": last.step,
        "final_train_error": last.train_error,
        "final_test_error": last.test_error,
        "final_train_loss": last.train_loss,
        "final_test_loss": last.test_loss,
        "best_test_error": best.test_error,
        "best_test_step": math.nan if math.isnan(best.test_error) else best.step,
        "selected_step": chosen,
        "selected_test_error": next(r.test_error for r in records if r.step == chosen),
        "mean_error_gap": fmean(abs(r.train_error - r.test_error) for r in records),
        "mean_loss_gap": fmean(abs(r.train_loss - r.test_loss) for r in records),
    }


def aggregate(trials: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the mean over trials of every figure, and several trials themselves as ``per_trial``.

    Times are means over the trials that were timed.

    Raises:
        ValueError: if there are no trials, or their keys differ.
    """
    if not trials or any(trial.keys() != trials[0].keys() for trial in trials):
        raise ValueError(
            f"aggregate takes one or more trials of equal keys, got {[sorted(t) for t in trials]}"
        )
    if len(trials) == 1:
        return dict(trials[0])
    means: dict[str, Any] = {
        key: _measured_mean([trial[key] for trial in trials])
        if key in TIMES
        else fmean(trial[key] for trial in trials)
        for key in trials[0]
    }
    return {**means, "per_trial": [dict(trial) for trial in trials]}


def _measured_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _lowest(records: Sequence[Record], *columns: str) -> Record:
    """Return the first record of lowest values; the first of all where no value is a number.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("there are no records to summarise: record at least one step")
    return min(records, key=lambda record: [_nan_last(getattr(record, c)) for c in columns])


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _column(records: Iterable[Record], column: str) -> Array:
    return np.array([getattr(record, column) for record in records], dtype=np.float64)


def _check_column(column: str) -> None:
    if column not in METRICS:
        raise KeyError(f"column must be one of {', '.join(METRICS)}, got {column!r}")
