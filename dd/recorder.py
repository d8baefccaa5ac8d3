"""Sends what one optimizer and trial shows where it belongs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dd.checkpoint import Checkpoint
from dd.console import ProgressDisplay
from dd.optimizer import DecoupledDescent
from dd.results import Results
from dd.stability import EdgeWatch
from dd.tracking import Record
from dd.wandb_logging import WandbRun

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
        edge: looks at every recorded state.
        sentences: what the optimizer has warned of.
        display: shows the records, if there is one.
        task: this optimizer's bar in it.
        seconds: of each update.
    """

    name: str
    trial: int
    results: Results
    tracker: WandbRun
    checkpoint: Checkpoint
    edge: EdgeWatch
    sentences: list[str]
    display: ProgressDisplay | None = None
    task: Any = None
    seconds: list[float] = field(default_factory=list)

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Take losses and errors."""
        self.edge.look(step)
        entry = Record(self.name, self.trial, step, **figures)
        self.results.history.append(entry)
        self.tracker.log(entry)
        if self.display is not None:
            self.display.update(self.task, entry)

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint, from which alone a run is resumed, and the history."""
        progress = {
            "seconds": self.seconds,
            "sentences": self.sentences,
            "edge": self.edge.state_dict(),
            "warned": _warned(optimizer),
            "wandb": self.tracker.id,
        }
        run = self.results.state_dict()
        self.checkpoint.keep(self.name, step, model, optimizer, progress, run)
        self.results.history.write_csv(self.checkpoint.path.with_name("history.csv"))

    def spend(self, seconds: float) -> None:
        """Take the time of one update."""
        self.seconds.append(seconds)

    def finish(self) -> None:
        """Take down that training is through, before the last step of the schedule or at it."""
        self.results.complete(self.name, self.trial, self.seconds)
        self.tracker.summarise(self.results.figures(self.name, self.trial))
        if self.display is not None:
            self.display.finish(self.task)

    def restore(self, progress: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Go on from what :meth:`keep` wrote.

        Args:
            progress: of this optimizer and trial.
            optimizer: with its state loaded.
        """
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
