"""What a run has found so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import median
from typing import Any

import torch

from dd.estimate import Estimate
from dd.tracking import History, Record, aggregate, summarise

__all__ = ["Results"]


@dataclass
class Results:
    """The findings of all optimizers and trials.

    Attributes:
        history: every record.
        failures: one sentence for each optimizer and trial that turned non-finite.
        notes: what else the user should know of an optimizer and trial.
        noise: a line on the noise model of each decoupled optimizer, of the first trial.
        times: of each optimizer and trial that was completed, the seconds of all its updates and
            its updates a second.
        num_train: number of training samples.
    """

    history: History = field(default_factory=History)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    noise: dict[str, str] = field(default_factory=dict)
    times: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    num_train: int = 0

    def complete(self, name: str, trial: int, seconds: Sequence[float]) -> None:
        """Take down that an optimizer and trial is completed.

        Args:
            name: of the optimizer.
            trial: which repetition.
            seconds: of each update; none where the trial was not timed by itself.
        """
        timed = (sum(seconds), 1 / median(seconds)) if seconds else (math.nan, math.nan)
        self.times[name, trial] = timed
        self.history.completed.add((name, trial))

    def fail(self, sentence: str) -> None:
        """Take down that an optimizer and trial turned non-finite."""
        if sentence not in self.failures:
            self.failures.append(sentence)

    def is_through(self, name: str, trial: int, label: str) -> bool:
        """Whether an optimizer and trial is completed, or failed under this label."""
        failed = any(sentence.startswith(f"{label}:") for sentence in self.failures)
        return failed or (name, trial) in self.times

    def note(self, notes: Sequence[str]) -> None:
        """Add sentences that were not said before."""
        for note in notes:
            if note not in self.notes:
                self.notes.append(note)

    def figures(self, name: str, trial: int) -> dict[str, float]:
        """Return the figures of one optimizer and trial; times are NaN where it was not completed.

        Raises:
            KeyError: if it has no records.
        """
        seconds, rate = self.times.get((name, trial), (math.nan, math.nan))
        figures = summarise(self.history.select(name, trial))
        figures |= self._interval(name, figures["final_train_error"])
        return figures | {"seconds": seconds, "steps_per_second": rate}

    def _interval(self, name: str, error: float) -> dict[str, float]:
        """The 90 % interval of the test error from a decoupled optimizer's training error."""
        if name not in self.noise or self.num_train < 2:
            return {}
        if not math.isfinite(error):
            return {"final_error_lower": math.nan, "final_error_upper": math.nan}
        wrong = torch.tensor(error * self.num_train, dtype=torch.float64).round()
        found = Estimate.of_sums(wrong, wrong, self.num_train, 0.9)
        return {"final_error_lower": float(found.lower), "final_error_upper": float(found.upper)}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each optimizer, as in ``summary.json``."""
        return {name: self._summarise(name) for name in self.history.optimizers}

    def _summarise(self, name: str) -> dict[str, Any]:
        trials = self.history.trials(name)
        completed = sum((name, trial) in self.times for trial in trials)
        figures = aggregate([self.figures(name, trial) for trial in trials])
        return figures | {"completed_trials": completed}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        return {
            "history": [astuple(record) for record in self.history.records],
            "failures": list(self.failures),
            "notes": list(self.notes),
            "noise": dict(self.noise),
            "times": [(*key, *times) for key, times in self.times.items()],
            "num_train": self.num_train,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Results":
        """Return what :meth:`state_dict` described."""
        times = {(name, trial): (total, rate) for name, trial, total, rate in state["times"]}
        return cls(
            History([Record(*row) for row in state["history"]], set(times)),
            list(state["failures"]),
            list(state["notes"]),
            dict(state["noise"]),
            times,
            state["num_train"],
        )
