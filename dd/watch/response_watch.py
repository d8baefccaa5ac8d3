"""Optimizers whose response is known too poorly for the training error to be believed."""

import torch
from torch import Tensor

__all__ = [
    "LARGEST_SHADOWS",
    "ResponseWarning",
    "few_directions_message",
    "optimizer_message",
    "regression_message",
    "units_message",
]

# |Q|/|R| above which responses were found to be wrong, where there is a sample to an input or more:
# 0.2 to 0.52 where they were right, 0.65 and more where not (section 11 of docs/theory.md).
LARGEST_SHADOWS = 0.6

_SINGLE = 32

# Ten to each of the four quantities of a regression.
FEW_INPUTS = 40
# Packages whose optimizers' regressions were measured (docs/optimizers.md).
MEASURED = ("torch", "lion_pytorch", "schedulefree")


class ResponseWarning(UserWarning):
    """How an optimizer answers to its gradients is known poorly: the training error may be off.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.ResponseWarning)  # end such a run at once
        >>> dd.decouple(model, torch.optim.Rprop(model.parameters()))
        Traceback (most recent call last):
            ...
        dd.watch.response_watch.ResponseWarning: dd.decouple: Rprop ...
    """


def optimizer_message(optimizer: torch.optim.Optimizer) -> str | None:
    """Say what to expect of an optimizer whose response was measured to be found poorly.

    Returns:
        A sentence or two, or None.
    """
    reason = None
    if isinstance(optimizer, torch.optim.Rprop):
        reason = "its steps tell little of the gradients' size; the loss was off by 0.7, and"
    elif isinstance(optimizer, torch.optim.RMSprop) and any(
        group["momentum"] != 0 for group in optimizer.param_groups
    ):
        reason = "with momentum its buffer is followed coarsely; the loss was off by 0.4, and"
    if reason is None:
        return None
    name = type(optimizer).__name__
    return (
        f"dd.decouple: {name} is followed coarsely: {reason} the error by two to four points in "
        "our measurements (docs/optimizers.md). Use AdamW, NAdam, Muon or SGD for an error that "
        "can be relied on."
    )


def few_directions_message(optimizer: torch.optim.Optimizer, rank: float) -> str | None:
    """Say what to expect where units answer to each other and the noise has few dimensions.

    Args:
        optimizer: moves the decoupled weight.
        rank: effective rank of the noise.

    Returns:
        A sentence or two, or None.
    """
    if rank >= FEW_INPUTS:
        return None
    return (
        f"dd.decouple: units answer to each other's gradients under {type(optimizer).__name__}, "
        f"and the noise of the inputs has {rank:.0f} dimensions where {FEW_INPUTS} tell how. "
        "Expect the training error to be off by several points; scale the columns of the inputs "
        "alike where they differ, or use SGD."
    )


def units_message(optimizer: torch.optim.Optimizer) -> str:
    """What to say where rows that share noise are followed by a regression."""
    return (
        f"dd.decouple: {type(optimizer).__name__} is followed by regression, which for rows that "
        "are left out together was tried on few problems: the training error of 300 groups of 4 "
        "rows was up to 0.12 off, more the fewer the groups and the more their rows correlate. "
        "SGD and Muon are followed exactly."
    )


def regression_message(
    optimizer: torch.optim.Optimizer, weight: Tensor, rank: float, *, by_stein: bool
) -> str | None:
    """Say what to expect of a response found by regression where that is coarse.

    Args:
        optimizer: moves the decoupled weight.
        weight: of the decoupled layer, shape (k, d).
        rank: inputs that the noise varies in: its effective rank.
        by_stein: whether the curvature is Stein's, which makes up for errors of the response.

    Returns:
        A sentence or two, or None.
    """
    name, inputs = type(optimizer).__name__, round(min(weight.shape[1], rank))
    if torch.finfo(weight.dtype).bits < _SINGLE:
        return (
            f"dd.decouple: weights in {weight.dtype} are moved by the rounding of every step as "
            f"much as by {name}, and how it answers to the gradients is found by regression "
            "alone. Keep the weights in float32, and compute in half precision by torch.autocast."
        )
    is_measured = type(optimizer).__module__.partition(".")[0] in MEASURED
    if by_stein and inputs >= FEW_INPUTS and is_measured:
        return None
    if by_stein and inputs >= FEW_INPUTS:
        reason = (
            "that was not measured for it: such a regression served some optimizers and left the "
            "error of others three points off. Hold its figure against a test set once, or use"
        )
    elif by_stein:
        reason = (
            f"from noise of {inputs} dimensions a unit's coefficients are known to some tenths. "
            "Expect the training error to be off by several points; scale the columns of the "
            "inputs alike where they differ, or use"
        )
    else:
        reason = (
            'with curvature="probe", or without the components of the inputs, that was measured '
            "to leave the error up to five points too low. Give the components, "
            'noise=dd.NoiseModel.fit(inputs, labels), and leave curvature="auto"; or use'
        )
    return (
        f"dd.decouple: {name} acts on every weight by itself, so that its response is found by "
        f"regression, and {reason} an optimizer that is followed exactly (SGD, Muon; "
        "docs/optimizers.md)."
    )
