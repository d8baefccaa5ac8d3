"""Whether the optimizer's own state is still the one that its shadows belong to."""

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.gradient_check import same_weight
from dd.correction.optimizer_state import OptimizerState
from dd.rules.quantities import state_name
from dd.rules.response import ResponseIdentifier
from dd.rules.response_shadows import SIGNAL, shadow_key

__all__ = ["FollowedStates", "own_states", "pools_units"]

_MARKS = "shadow_states"


def own_states(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Tensors of a weight's shape in an optimizer's state of it, by their keys."""
    state = optimizer.state.get(weight, {})
    return {
        key: value.detach()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()
    }


def pools_units(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    """Whether an optimizer's state of a weight (k, d) has one number an input for all units."""
    units, inputs = weight.shape
    return units > 1 and any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 0
        and value.numel() == inputs == value.shape[-1]
        for value in optimizer.state.get(weight, {}).values()
    )


class FollowedStates:
    """Knows the tensors of the optimizer's state that have shadows again.

    Args:
        attachment: of the layer.
        store: what is kept of each parameter.
        identifier: knows which tensors are followed.
        optimizer: keeps them.
    """

    def __init__(
        self,
        attachment: Attachment,
        store: OptimizerState,
        identifier: ResponseIdentifier,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._attachment, self._store = attachment, store
        self._identifier, self._optimizer = identifier, optimizer

    def mark(self) -> None:
        """Remember what a step leaves of them."""
        attachment, followed = self._attachment, self._identifier.followed
        state = self._store.of(attachment.weight)
        if not followed:
            state.pop(_MARKS, None)
            return
        states = own_states(self._optimizer, attachment.weight)
        state[_MARKS] = torch.stack([attachment.along(states[key]) for key in followed])

    def take_up(self) -> None:
        """Look at them before a step: what was cleared has a shadow of zero.

        Raises:
            RuntimeError: if one is neither zero, nor gone, nor what the last step left.
        """
        attachment, identifier = self._attachment, self._identifier
        state = self._store.of(attachment.weight)
        marks = state.get(_MARKS)
        if marks is None:
            return
        states = own_states(self._optimizer, attachment.weight)
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
                    f"dd.decouple: {key!r} in the optimizer's state of layer {attachment.name!r} "
                    "is not what the last step left, and its shadow does not fit it. Load the "
                    "states of model, optimizer and tracker together; to begin the optimizer's "
                    "state anew, clear it or set it to zero."
                )
