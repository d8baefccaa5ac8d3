"""Shadows moved by the very call of SGD that moves the weights."""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from dd.correction.attachment import Attachment
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadow_step import ShadowStep
from dd.correction.shadows import ShadowUpdate
from dd.correction.training_forward import full_precision
from dd.watch.step_watches import StepWatches

__all__ = ["GroupTensors", "Scaling", "attached_step", "check_rate", "move_group"]

_RATE_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class GroupTensors:
    """The parameters of a group that a step moves, as torch's own optimizer collects them.

    Attributes:
        params: that have gradients.
        gradients: of each.
        buffers: momentum of each, or None before its first step.
        sparse: whether a gradient is.
    """

    params: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor | None]
    sparse: bool


@dataclass(frozen=True, eq=False)
class Scaling:
    """What a gradient scaler, or a refused step, tells torch's fused update.

    Attributes:
        refusal: 1 where the step must change nothing, else 0, shape (); None where that is known.
        grad_scale: of the scaler, or None.
        found_inf: of the scaler, or None.
    """

    refusal: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def stop(self) -> Tensor | None:
        """As ``found_inf`` of torch's fused update, which changes nothing where it is told so."""
        return self.found_inf if self.refusal is None else self.refusal


def attached_step(
    attachment: Attachment,
    store: OptimizerState,
    watches: StepWatches,
    damping: float,
    move: Callable[[list[ShadowUpdate], Tensor | None], None],
) -> None:
    """Make one step of an attached optimizer.

    Args:
        attachment: with the pending training forwards.
        store: the optimizer's state.
        watches: see the steps on all samples.
        damping: ρ.
        move: moves all groups, and shadows beside them, where the step is not refused.

    Raises:
        RuntimeError: as :meth:`dd.correction.shadow_step.ShadowStep.updates`, or if
            another optimizer has taken the layer over.
        FloatingPointError: likewise.
    """
    attachment.require_own()
    verdicts = attachment.verdicts
    if verdicts.defers and (watches.looks or not store.may_defer(attachment)):
        verdicts.end()
    verdicts.settle(wait=not verdicts.defers)
    try:
        step = ShadowStep(attachment, store, watches, damping)
        with full_precision(attachment.weight):
            updates = step.updates()
            move(updates, verdicts.refusal)
            attachment.remember_weight(store.of(attachment.weight))
    finally:
        verdicts.end()


def move_group(
    group: dict[str, Any],
    moved: GroupTensors,
    state: MutableMapping[Tensor, Any],
    updates: list[ShadowUpdate],
    scaling: Scaling,
) -> None:
    """Move the parameters of a group, and the shadows that belong to them.

    Args:
        group: its settings.
        moved: what it moves.
        state: of the optimizer.
        updates: shadows of any group.
        scaling: whether the step may change anything.
    """
    position = {id(parameter): i for i, parameter in enumerate(moved.params)}
    moving = [update for update in updates if id(update.parameter) in position]
    for update in moving:
        if update.parameter_gradient is not None:
            moved.gradients[position[id(update.parameter)]] = update.parameter_gradient
    rule = partial(_apply, group, scaling)
    rule(moved.params, moved.gradients, moved.buffers, sparse=moved.sparse)
    momentum = group["momentum"] != 0
    if momentum:
        for parameter, buffer in zip(moved.params, moved.buffers, strict=True):
            state[parameter]["momentum_buffer"] = buffer
    # By the very call that moved the weights, so that whatever rule moves W moves Q.
    dense = bool(group["fused"]) or scaling.refusal is not None
    for update in moving:
        for piece in update.pieces():
            piece.move(rule, momentum=momentum, dense=dense)


def _apply(
    group: dict[str, Any],
    scaling: Scaling,
    params: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor | None],
    *,
    sparse: bool = False,
) -> None:
    is_known, stop = scaling.refusal is None, scaling.stop
    decay = group["weight_decay"]
    if group["decoupled_weight_decay"]:
        for parameter in params:
            kept = 1 if stop is None else 1 - stop.to(parameter.dtype)
            parameter.mul_(1 - group["lr"] * decay * kept)
        decay = 0.0
    sgd(
        params,
        gradients,
        buffers,
        weight_decay=decay,
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        has_sparse_grad=sparse,
        foreach=group["foreach"] if is_known else False,
        fused=group["fused"] if is_known else True,
        grad_scale=scaling.grad_scale,
        found_inf=stop,
    )


def check_rate(lr: float | Tensor | str) -> None:
    """Check a learning rate, but for one on a device.

    Raises:
        ValueError: if it is no finite number of at least 0.
    """
    if isinstance(lr, str):
        raise ValueError(
            f'Invalid learning rate: {lr!r} in a parameter group; DecoupledDescent takes lr="auto" '
            "for all parameters alone, as its own argument"
        )
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    # A rate on a device is not read back: that would stall every step.
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return
    value = float(lr.detach()) if isinstance(lr, Tensor) else lr
    # A schedule that ends at 0 can round to just below it.
    if not (math.isfinite(value) and value >= -_RATE_ROUNDING):
        raise ValueError(
            f"Invalid learning rate: {value}; DecoupledDescent expects a finite rate of at least "
            "0. Check the learning-rate schedule if it came from one."
        )
