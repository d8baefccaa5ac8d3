"""Weights that an optimizer moves outside of its steps, as Schedule-Free's ``eval()`` does."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.gradient_check import same_weight
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadows import KEY
from dd.correction.training_forward import full_precision
from dd.functional.response import combined
from dd.rules.combination import combination
from dd.rules.followed_states import own_states
from dd.rules.quantities import WEIGHT, state_name
from dd.rules.response_shadows import SIGNAL, shadow_key, signal_key
from dd.support.growth import grown

__all__ = ["OutsideMoves"]

# Where the decoupled weight's state keeps the weight that its shadows belong to.
_LEFT = "shadow_weight_left"


class OutsideMoves:
    """Follows a weight that has become a combination of what its optimizer keeps.

    Args:
        attachment: of the layer.
        store: what is kept of each parameter.
        optimizer: moves the decoupled weight.
    """

    def __init__(
        self, attachment: Attachment, store: OptimizerState, optimizer: torch.optim.Optimizer
    ) -> None:
        self._attachment, self._store, self._optimizer = attachment, store, optimizer

    def remember(self) -> None:
        """Keep the weight as a step has left it, where something may be swapped with it."""
        weight = self._attachment.weight
        state = self._store.of(weight)
        if self._followed(state):
            state[_LEFT] = weight.detach().clone()
        else:
            state.pop(_LEFT, None)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the shadows as the weight has moved since it was last looked at.

        A weight that is no combination is left to be refused by the forward.
        """
        with full_precision(self._attachment.weight):
            self._follow()

    def _follow(self) -> None:
        attachment = self._attachment
        weight = attachment.weight.detach()
        state = self._store.of(attachment.weight)
        left: Tensor | None = state.get(_LEFT)
        expected = state.get("shadow_weight")
        if left is None or expected is None:
            return
        if bool(same_weight(weight, attachment.direction, expected)):
            return
        tensors = {WEIGHT: left} | self._followed(state)
        coefficients = combination(weight, tensors)
        if coefficients is None:
            return
        attachment.shadows.flush(state)
        parts = [state[shadow_key(name)] for name in tensors]
        state[KEY] = combined(parts, coefficients[:, None])
        if state.get(SIGNAL) is not None:
            known = [state.get(signal_key(name)) for name in tensors]
            nothing = torch.zeros_like(state[SIGNAL])
            along = [nothing if part is None else grown(part, len(nothing)) for part in known]
            state[SIGNAL] = combined(along, coefficients[:, None])
        attachment.remember_weight(state)
        state[_LEFT] = weight.clone()

    def _followed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the optimizer's state whose shadows are kept, by their names."""
        states = own_states(self._optimizer, self._attachment.weight)
        named = {state_name(key): value for key, value in states.items()}
        return {name: value for name, value in named.items() if shadow_key(name) in state}
