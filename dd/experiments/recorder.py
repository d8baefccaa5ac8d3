"""Sends what one optimizer and trial shows where it belongs."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import nn

from dd.baselines.hyperparameter_search import SearchResult
from dd.experiments.checkpoint import Checkpoint
from dd.optimizer import DecoupledDescent
from dd.runs.fit import Fit, SelectionRow, fitted
from dd.runs.results import Results
from dd.tracking.console import ProgressDisplay
from dd.tracking.history import Record
from dd.tracking.wandb_logging import WandbRun
from dd.training.doubts import doubts_of
from dd.training.stability import EdgeWatch

__all__ = ["Recorder"]


@dataclass
class Recorder:
    """Follows the training of one optimizer and trial.

    Attributes:
        name: of the optimizer.
        trial: which repetition.
        results: receives the records.
        tracker: receives them too.
        checkpoint: receives the states.
        write: writes what the run has found so far.
        edge: looks at every recorded state.
        optimizer: that trains; candidates have others.
        sentences: what the optimizer has warned of.
        display: shows the records, if there is one.
        task: this optimizer's bar in it.
        setup: seconds of what came before the first update.
        seconds: of each update.
        gradients: samples whose loss was differentiated.
    """

    name: str
    trial: int
    results: Results
    tracker: WandbRun
    checkpoint: Checkpoint
    write: Callable[[], None]
    edge: EdgeWatch
    optimizer: torch.optim.Optimizer
    sentences: list[str]
    display: ProgressDisplay | None = None
    task: Any = None
    setup: float = 0.0
    seconds: list[float] = field(default_factory=list)
    gradients: int = 0
    _first: Record | None = None

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Take losses and errors."""
        self.edge.look(step)
        self.doubt()
        entry = Record(self.name, self.trial, step, **figures)
        self.results.history.append(entry)
        self.tracker.log(entry)
        if self.display is not None:
            self.display.update(self.task, entry)

    def log_again(self) -> None:
        """Log what was recorded before an interruption, of which some may not have been sent."""
        for entry in self.results.history.records:
            if (entry.optimizer, entry.trial) == (self.name, self.trial):
                self.tracker.log(entry)

    def doubt(self) -> None:
        """Take down why the training error is not to be believed, by now."""
        self.results.doubt(self.name, self.trial, doubts_of(self.optimizer))

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint, from which alone a run is resumed, and what else was found."""
        progress = {
            "setup": self.setup,
            "seconds": self.seconds,
            "gradients": self.gradients,
            "sentences": self.sentences,
            "edge": self.edge.state_dict(),
            "warned": _warned(optimizer),
        }
        run = self.results.state_dict()
        self.checkpoint.keep(self.name, step, model, optimizer, progress, run)
        self.write()

    def spend(self, seconds: float, samples: int) -> None:
        """Take the time of one update, and how many samples' loss it differentiated."""
        self.seconds.append(seconds)
        self.gradients += samples

    def finish(self, *, ends_at_best: bool) -> None:
        """Take down that training is through, before the last step of the schedule or at it.

        Args:
            ends_at_best: whether the last weights are those to report.
        """
        step = self.results.history.select(self.name, self.trial)[-1].step if ends_at_best else None
        samples = self.results.num_train
        self._complete(fitted(self.seconds, self.setup, self.gradients, samples, step))

    def take(self, chosen: SearchResult) -> None:
        """Take what was chosen among candidates, instead of records one by one."""
        for step, figures in chosen.trained.run.records:
            entry = Record(self.name, self.trial, step, **figures)
            self.results.history.append(entry)
            self.tracker.log(entry)
        self.results.selection += [
            SelectionRow(self.name, self.trial, *astuple(candidate), *astuple(judgement))
            for candidate, curve in chosen.curves.items()
            for judgement in curve
        ]
        self.results.doubt(self.name, self.trial, doubts_of(chosen.trained.optimizer))
        self._complete(chosen.fit)
        assert chosen.fit.step is not None
        self.keep(chosen.fit.step, chosen.trained.run.model, chosen.trained.optimizer)

    def _complete(self, fit: Fit) -> None:
        self.results.complete(self.name, self.trial, fit)
        self.tracker.summarise(self.results.findings(self.name, self.trial))
        if self.display is not None:
            self.display.finish(self.task)

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Show the figures of a candidate after so many updates of all of them."""
        record = Record(self.name, self.trial, step, **figures)
        self._first = self._first or record
        if self.display is not None:
            self.display.update(self.task, record)

    def take_first(self) -> None:
        """Take the start alone, where no candidate came to its end."""
        assert self._first is not None
        self.results.history.append(self._first)

    def restore(self, progress: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Go on from what :meth:`keep` wrote.

        Args:
            progress: of this optimizer and trial.
            optimizer: with its state loaded.
        """
        self.setup, self.gradients = progress["setup"], progress["gradients"]
        self.seconds[:] = progress["seconds"]
        self.sentences[:] = progress["sentences"]
        self.edge.load_state_dict(progress["edge"])
        _warn_on(optimizer, progress["warned"])
        if self.display is not None:
            self.display.update(self.task, self.results.history.select(self.name, self.trial)[-1])


def _warned(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer's warnings depend on beside its state."""
    if not isinstance(optimizer, DecoupledDescent) or optimizer._attachment is None:
        return {}
    oversight = optimizer._attachment.oversight
    return {"watches": optimizer._watches.state_dict(), "oversight": oversight.state_dict()}


def _warn_on(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    if not isinstance(optimizer, DecoupledDescent) or optimizer._attachment is None:
        return
    optimizer._watches.load_state_dict(state["watches"], optimizer.noise)
    optimizer._attachment.oversight.load_state_dict(state["oversight"])
