"""What a run has found so far."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dd.correction.estimate import Estimate
from dd.runs.fit import Fit, SelectionRow
from dd.tracking.history import History, Record, aggregate, selected_step, summarise

__all__ = ["Results"]

Array = npt.NDArray[np.float64]


@dataclass
class Results:
    """The findings of all optimizers and trials.

    Attributes:
        history: every record.
        failures: one sentence for each optimizer and trial that turned non-finite.
        notes: what else the user should know of an optimizer and trial.
        noise: a line on the noise model of each decoupled optimizer, of the first trial.
        data: what was read of a user's files in the first trial (:class:`dd.data.reading.Reading`).
        fits: of each optimizer and trial that was completed, what it took and what it reports.
        selection: validation curves of all candidates of optimizers that choose among several.
        num_train: number of training samples.
        token: that this run shares with no other.
        doubts: why the training error of an optimizer and trial is not to be believed.
    """

    history: History = field(default_factory=History)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    noise: dict[str, str] = field(default_factory=dict)
    fits: dict[tuple[str, int], Fit] = field(default_factory=dict)
    selection: list[SelectionRow] = field(default_factory=list)
    num_train: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    doubts: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def complete(self, name: str, trial: int, fit: Fit) -> None:
        """Take down that an optimizer and trial is completed."""
        self.fits[name, trial] = fit
        self.history.completed.add((name, trial))

    def fail(self, sentence: str) -> None:
        """Take down that an optimizer and trial turned non-finite."""
        if sentence not in self.failures:
            self.failures.append(sentence)

    def doubt(self, name: str, trial: int, sentences: Sequence[str]) -> None:
        """Take down why the training error of an optimizer and trial is not to be believed."""
        if sentences:
            self.doubts[name, trial] = tuple(sentences)

    def is_through(self, name: str, trial: int, label: str) -> bool:
        """Whether an optimizer and trial is completed, or failed under this label."""
        failed = any(sentence.startswith(f"{label}:") for sentence in self.failures)
        return failed or (name, trial) in self.fits

    def note(self, notes: Sequence[str]) -> None:
        """Add sentences that were not said before."""
        for note in notes:
            if note not in self.notes:
                self.notes.append(note)

    def figures(self, name: str, trial: int) -> dict[str, float]:
        """Return the figures of one optimizer and trial; what it took is NaN where not completed.

        Raises:
            KeyError: if it has no records.
        """
        fit = self.fits.get((name, trial), Fit())
        records = self.history.select(name, trial)
        figures = summarise(records)
        figures |= self._interval(name, figures["final_train_error"])
        return figures | reported(records, fit) | fit.figures()

    def findings(self, name: str, trial: int) -> dict[str, Any]:
        """Return the figures of one optimizer and trial, and the doubts where there are some.

        Raises:
            KeyError: if it has no records.
        """
        return {**self.figures(name, trial), **self._doubts(name, [trial])}

    def _doubts(self, name: str, trials: Sequence[int]) -> dict[str, list[str]]:
        every = (said for trial in trials for said in self.doubts.get((name, trial), ()))
        found = list(dict.fromkeys(every))
        return {"doubts": found} if found else {}

    def _interval(self, name: str, error: float) -> dict[str, float]:
        """The 90 % interval of the test error from a decoupled optimizer's training error."""
        if name not in self.noise or self.num_train < 2:
            return {}
        if not math.isfinite(error):
            return {"final_error_lower": math.nan, "final_error_upper": math.nan}
        wrong = torch.tensor(error * self.num_train, dtype=torch.float64).round()
        found = Estimate.of_sums(wrong, wrong, self.num_train, 0.9)
        return {"final_error_lower": float(found.lower), "final_error_upper": float(found.upper)}

    def validation(self) -> dict[str, dict[str, tuple[Array, Array]]]:
        """Return what the chosen candidates were judged by on samples held out.

        Returns:
            For the name of each optimizer that held samples out, and "error" and "loss", the steps
            that all trials judged, and medians over trials.
        """
        found = {name: self._chosen_rows(name) for name in self.history.optimizers}
        return {name: _medians(trials) for name, trials in found.items() if trials}

    def _chosen_rows(self, name: str) -> list[list[SelectionRow]]:
        """Validation of the chosen candidate, trial after trial."""
        trials = []
        for (other, trial), fit in self.fits.items():
            rows = [
                row
                for row in self.selection
                if (row.optimizer, row.trial) == (name, trial)
                and (row.lr, row.weight_decay) == (fit.lr, fit.weight_decay)
            ]
            # A tracked choice is judged by the training curve itself.
            if other == name and rows and name not in self.noise:
                trials.append(rows)
        return trials

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each optimizer, as in ``summary.json``."""
        return {name: self._summarise(name) for name in self.history.optimizers}

    def _summarise(self, name: str) -> dict[str, Any]:
        trials = self.history.trials(name)
        completed = sum((name, trial) in self.fits for trial in trials)
        found = [self.figures(name, trial) for trial in trials]
        # A trial that failed has chosen nothing.
        keys = dict.fromkeys(key for each in found for key in each)
        figures = aggregate([{key: each.get(key, math.nan) for key in keys} for each in found])
        for trial, own in zip(trials, figures.get("per_trial", ()), strict=False):
            own |= self._doubts(name, [trial])
        return figures | {"completed_trials": completed} | self._doubts(name, trials)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        return {
            "history": [astuple(record) for record in self.history.records],
            "failures": list(self.failures),
            "notes": list(self.notes),
            "noise": dict(self.noise),
            "fits": [(*key, *astuple(fit)) for key, fit in self.fits.items()],
            "selection": [astuple(row) for row in self.selection],
            "num_train": self.num_train,
            "token": self.token,
            "doubts": [(*key, list(said)) for key, said in self.doubts.items()],
            "data": self.data,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Results":
        """Return what :meth:`state_dict` described."""
        fits = {(name, trial): Fit(*rest) for name, trial, *rest in state["fits"]}
        return cls(
            History([Record(*row) for row in state["history"]], set(fits)),
            list(state["failures"]),
            list(state["notes"]),
            dict(state["noise"]),
            fits,
            [SelectionRow(*row) for row in state["selection"]],
            state["num_train"],
            state["token"],
            {(name, trial): tuple(said) for name, trial, said in state.get("doubts", [])},
            dict(state["data"]),
        )


def _medians(trials: Sequence[Sequence[SelectionRow]]) -> dict[str, tuple[Array, Array]]:
    common = set.intersection(*({row.step for row in rows} for rows in trials))
    steps = np.array(sorted(common), dtype=np.float64)
    curves = {}
    for metric in ("error", "loss"):
        values = [
            [getattr(row, f"validation_{metric}") for row in rows if row.step in common]
            for rows in trials
        ]
        curves[metric] = steps, np.median(np.array(values, dtype=np.float64), axis=0)
    return curves


def reported(records: Sequence[Record], fit: Fit) -> dict[str, float]:
    """What an optimizer says of its error on new data without the test set, and how true it is.

    That is the error by which it was chosen where there are candidates; else the training error
    of the weights it ends with where it stops by itself, and of the step of the lowest otherwise.

    Args:
        records: of one optimizer and trial.
        fit: what it took.
    """
    step = selected_step(records) if fit.step is None else fit.step
    record = next(r for r in records if r.step == step)
    error = record.train_error if fit.error is None else fit.error
    return {
        "reported_step": step,
        "reported_error": error,
        "reported_test_error": record.test_error,
        "reported_gap": abs(error - record.test_error),
    }
