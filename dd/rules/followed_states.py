"""Whether the optimizer's own state is still the one that its shadows belong to."""

from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.gradient_check import same_weight
from dd.functional import at_least_single
from dd.rules.response import ResponseIdentifier, state_name
from dd.rules.response_shadows import SIGNAL, shadow_key

__all__ = ["mark_states", "own_states", "take_up_states"]

_MARKS = "shadow_states"


def own_states(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Tensors of a weight's shape in an optimizer's state of it, by their keys."""
    state = optimizer.state.get(weight, {})
    return {
        key: value.detach()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()
    }


def mark_states(
    attachment: Attachment,
    state: dict[str, Any],
    identifier: ResponseIdentifier,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Remember, in the decoupled weight's state, what a step leaves of the tensors followed.

    Args:
        attachment: of the layer.
        state: of the decoupled weight.
        identifier: knows which are followed.
        optimizer: keeps them.
    """
    states = own_states(optimizer, attachment.weight)
    if not identifier.followed:
        state.pop(_MARKS, None)
        return
    found = [at_least_single(states[key]) for key in identifier.followed]
    direction = attachment.direction
    state[_MARKS] = torch.stack([value @ direction.to(value) for value in found])


def take_up_states(
    attachment: Attachment,
    state: dict[str, Any],
    identifier: ResponseIdentifier,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Look at the optimizer's state before a step: what was cleared has a shadow of zero.

    Args:
        attachment: of the layer.
        state: of the decoupled weight, as :func:`mark_states` left it.
        identifier: knows which tensors are followed.
        optimizer: keeps them.

    Raises:
        RuntimeError: if one is neither zero, nor gone, nor what the last step left.
    """
    marks = state.get(_MARKS)
    if marks is None:
        return
    states = own_states(optimizer, attachment.weight)
    for key, mark in zip(list(identifier.followed), marks, strict=True):
        value, shadow = states.get(key), shadow_key(state_name(key))
        along = f"{SIGNAL}.{state_name(key)}"
        if value is None:
            attachment.shadows.release(state, shadow)
            state.pop(along, None)
            identifier.forget(key)
        elif bool(same_weight(value, attachment.direction, mark)):
            continue
        elif not bool(value.count_nonzero()):
            attachment.shadows.flush(state)
            state[shadow].zero_()
            if along in state:
                state[along].zero_()
        else:
            raise RuntimeError(
                f"dd.decouple: {key!r} in the optimizer's state of layer {attachment.name!r} is "
                "not what the last step left, and its shadow does not fit it. Load the states of "
                "model, optimizer and tracker together; to begin the optimizer's state anew, clear "
                "it or set it to zero."
            )
