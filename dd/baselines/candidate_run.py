"""Training one candidate on a part of the samples, and judging it on the others."""

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dd.training.loop import loss_and_error

__all__ = ["CandidateRun", "ValidationPoint"]


@dataclass(frozen=True)
class ValidationPoint:
    """A candidate at one step.

    Attributes:
        step: updates made.
        loss: mean over the samples that judge it.
        error: fraction of them misclassified.
    """

    step: int
    loss: float
    error: float

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better: the error, and the loss among equals; last where not a number."""
        return (
            math.inf if math.isnan(self.error) else self.error,
            math.inf if math.isnan(self.loss) else self.loss,
        )


@dataclass
class CandidateRun:
    """Follows the training of one candidate; an observer of :func:`dd.training.loop.train`.

    Attributes:
        model: in training.
        inputs: that judge it, shape (m, d); none where the tracked error does.
        targets: their classes, shape (m,).
        shown: is called at every record with its step and figures.
        judgements: one at every record.
        records: steps and figures of every record.
        best: weights of the best record after the first, and its judgement.
        seconds: of each update.
        judging: seconds that validation took.
        gradients: samples whose loss was differentiated.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    shown: Any = None
    judgements: list[ValidationPoint] = field(default_factory=list)
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best: tuple[ValidationPoint, dict[str, Tensor]] | None = None
    seconds: list[float] = field(default_factory=list)
    judging: float = 0.0
    gradients: int = 0

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Judge the weights, and keep those that are the best so far."""
        started = time.perf_counter()
        judgement = self._judge(step, figures)
        self.judging += time.perf_counter() - started
        self.judgements.append(judgement)
        self.records.append((step, figures))
        # Nobody chooses a network that was not trained.
        if step > 0 and (self.best is None or judgement.rank < self.best[0].rank):
            self.best = judgement, copy.deepcopy(self.model.state_dict())
        if self.shown is not None:
            self.shown(step, figures)

    @torch.no_grad()
    def _judge(self, step: int, figures: dict[str, float]) -> ValidationPoint:
        if len(self.targets) == 0:
            return ValidationPoint(step, figures["train_loss"], figures["train_error"])
        self.model.eval()
        loss, error = loss_and_error(self.model(self.inputs), self.targets)
        self.model.train()
        return ValidationPoint(step, loss, error)

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: only the chosen weights are kept."""

    def spend(self, seconds: float, samples: int) -> None:
        """Take the time of one update, and how many samples' loss it differentiated."""
        self.seconds.append(seconds)
        self.gradients += samples
