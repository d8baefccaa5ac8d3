"""The one loop that all experiments share."""

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd.data.split import Split
from dd.rules.line_search.settings import chooses_rate
from dd.support.checks import check_count
from dd.training.batches import Batches
from dd.training.doubts import closely
from dd.training.evaluation_weights import evaluation_weights, to_training_weights
from dd.training.launch import Processes

__all__ = ["Observer", "Schedule", "TrainingStopped", "loss_and_error", "measure", "train"]


class TrainingStopped(RuntimeError):
    """Training turned non-finite; the message gives the step and the likely cause."""


class Observer(Protocol):
    """Whoever follows a training run."""

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Take the losses and errors before an update; keys are the metrics of a record."""

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep a good state."""

    def spend(self, seconds: float, samples: int) -> None:
        """Take the time of one update, measuring not counted in, and its gradients.

        Args:
            seconds: that it took.
            samples: whose loss was differentiated, counted anew in every call of the closure.
        """


@dataclass(frozen=True)
class Schedule:
    """How long to train and how often to look.

    Attributes:
        steps: number of updates, at most.
        record_every: updates between two records; the last state is recorded in any case.
        checkpoint_every: updates between two checkpoints; the last state is kept in any case.

    Raises:
        ValueError: if a number is not a positive integer.
    """

    steps: int
    record_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(name, value)

    def records(self, step: int, *, stopped: bool = False) -> bool:
        """Whether the state after this many updates is recorded."""
        return step % self.record_every == 0 or self.ends(step, stopped=stopped)

    def keeps(self, step: int, *, stopped: bool = False) -> bool:
        """Whether the state after this many updates is kept."""
        return step % self.checkpoint_every == 0 or self.ends(step, stopped=stopped)

    def ends(self, step: int, *, stopped: bool = False) -> bool:
        """Whether this many updates are all, as they are once the optimizer has stopped."""
        return stopped or step == self.steps


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    schedule: Schedule,
    observer: Observer,
    batches: Batches,
    *,
    kept: int = -1,
    processes: Processes | None = None,
) -> None:
    """Train by softmax cross-entropy, until the schedule ends or the optimizer says ``stopped``.

    Args:
        model: maps inputs (n, d) to class scores (n, C).
        optimizer: any optimizer of the model's parameters whose ``step`` takes a closure.
        split: on the model's device.
        schedule: how long, and how often to look.
        observer: is shown the figures and the states.
        batches: the samples of every update.
        kept: step of the state that model and optimizer are in, if it was recorded and kept
            already; -1 for a run that begins.
        processes: that share the samples of every update; by default this one alone.

    Raises:
        TrainingStopped: if the loss or a gradient is not finite.
    """
    processes = processes or Processes()
    parallel = processes.wrapped(model)
    for step in range(max(kept, 0), schedule.steps + 1):
        stopped = bool(getattr(optimizer, "stopped", False))
        if step > kept and schedule.records(step, stopped=stopped):
            ends = schedule.ends(step, stopped=stopped)
            with evaluation_weights(model, optimizer, stay=ends):
                with closely(optimizer):
                    figures = measure(model, split)
                observer.record(step, figures)
                _require_finite(figures["train_loss"], step, optimizer)
        if step > kept and schedule.keeps(step, stopped=stopped):
            observer.keep(step, model, optimizer)
        if schedule.ends(step, stopped=stopped):
            break
        to_training_weights(optimizer)
        started = time.perf_counter()
        rows, weight = processes.part(batches.at(step), len(split.train_inputs))
        samples = _update(parallel, optimizer, split, rows, weight, step)
        observer.spend(time.perf_counter() - started, samples)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    rows: Tensor | None,
    weight: float,
    step: int,
) -> int:
    """Make one update, and return the number of samples whose loss was differentiated for it.

    Raises:
        TrainingStopped: if the loss is not finite.
    """
    inputs, targets = split.train_inputs, split.train_targets
    if rows is not None:
        rows = rows.to(inputs.device)
        inputs, targets = inputs[rows], targets[rows]
    calls = 0

    def closure() -> Any:
        nonlocal calls
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        if weight != 1.0:
            loss = weight * loss
        # Later calls are trials of an optimizer that chooses its step, free to be infinite.
        if calls == 0:
            _require_finite(float(loss.detach()), step, optimizer)
        calls += 1
        loss.backward(create_graph=getattr(optimizer, "needs_graph", False))
        return loss

    try:
        optimizer.step(closure)
    except FloatingPointError as error:
        raise TrainingStopped(str(error)) from error
    if split.train_inputs.is_cuda:
        torch.cuda.synchronize()
    return calls * len(inputs)


@torch.no_grad()
def measure(model: nn.Module, split: Split) -> dict[str, float]:
    """Return losses and errors on both sets; the model is left in train mode.

    The training figures are over all samples, in train mode, which under decoupled descent gives
    the corrected ones; the uncorrected and the test figures are those of the plain network. Without
    test samples the test figures are NaN.
    """
    model.eval()
    test = loss_and_error(model(split.test_inputs), split.test_targets)
    plain = loss_and_error(model(split.train_inputs), split.train_targets)
    model.train()
    corrected = loss_and_error(model(split.train_inputs), split.train_targets)
    return {
        "train_loss": corrected[0],
        "test_loss": test[0],
        "train_error": corrected[1],
        "test_error": test[1],
        "uncorrected_train_loss": plain[0],
        "uncorrected_train_error": plain[1],
    }


def loss_and_error(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the fraction misclassified, NaN of no samples.

    Args:
        scores: shape (n, C).
        targets: classes, shape (n,).
    """
    errors = scores.argmax(1) != targets
    return float(F.cross_entropy(scores, targets)), float(errors.double().mean())


def _require_finite(loss: float, step: int, optimizer: torch.optim.Optimizer) -> None:
    if math.isfinite(loss):
        return
    cause = "initial weights or inputs of a size that overflows"
    if not chooses_rate(optimizer):
        rates = ", ".join(f"{float(group['lr']):g}" for group in optimizer.param_groups)
        cause = f"a learning rate that is too large (lr={rates}): try half of it; else {cause}"
    raise TrainingStopped(
        f"the training loss is {loss} at step {step}. The likely cause is {cause}. "
        "The last good weights are in checkpoint.pt."
    )
