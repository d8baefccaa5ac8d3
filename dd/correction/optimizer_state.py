"""The state and the groups of an optimizer, as the correction reads and writes them."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.functional.arithmetic import stored_numbers

__all__ = ["FELL_BACK", "HEAD_LEFT", "OptimizerState"]

# Where the state of the decoupled weight says that the head is corrected no more.
HEAD_LEFT = "shadow_head_left"
# Likewise where a probe has taken the place of Stein's curvature.
FELL_BACK = "shadow_by_probe"

# In half precision the factor of the weight decay would be rounded.
_FUSED = (torch.float32, torch.float64)


class OptimizerState:
    """Access to what an optimizer keeps of each parameter.

    Args:
        state: of the optimizer, by parameter.
        groups: its parameter groups.
    """

    def __init__(
        self, state: MutableMapping[Tensor, dict[str, Any]], groups: Sequence[dict[str, Any]]
    ) -> None:
        self.state, self.groups = state, groups

    def of(self, parameter: Tensor) -> dict[str, Any]:
        """State of a parameter, made where there is none."""
        return self.state[parameter]

    def read(self, parameter: Tensor, key: str) -> Tensor | None:
        """What is kept of a parameter under a key."""
        return self.state[parameter].get(key) if parameter in self.state else None

    def write(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Keep a value of a parameter."""
        self.state[parameter][key] = value

    def leave(self, attachment: Attachment) -> bool:
        """Delete the displacements of what all samples share; returns whether there were any."""
        assert attachment.shared is not None
        begun = False
        for parameter, key in attachment.shared.parts:
            state = self.state.get(parameter, {})
            begun |= state.pop(key, None) is not None
            state.pop(f"{key}_momentum_buffer", None)
        if begun:
            self.state[attachment.weight][HEAD_LEFT] = torch.ones(())
        return begun

    def group_of(self, parameter: Tensor) -> dict[str, Any] | None:
        """The group of a parameter, or None."""
        return next((g for g in self.groups if any(p is parameter for p in g["params"])), None)

    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient that is not zero."""
        gradients = (p.grad for group in self.groups for p in group["params"])
        found = (stored_numbers(g) for g in gradients if g is not None and not g.is_meta)
        return any(bool(numbers.count_nonzero()) for numbers in found)

    def lacks_gradients(self) -> bool:
        """Whether no parameter has a gradient, not even of zero."""
        return all(p.grad is None for group in self.groups for p in group["params"])

    def may_defer(self, attachment: Attachment) -> bool:
        """Whether a step may go on before its conditions are known.

        Those are kept by :mod:`dd.watch.deferred_checks`.

        It may where to look would stall the device, and where torch's fused update, which can be
        told there to change nothing, is as good as another: one process, single or double
        precision, dense gradients, momentum that has begun, no wish for another implementation, and
        no head to correct. Stein's solution looks by itself, and waits there in any case.
        """
        if not attachment.stalls or attachment.ranks.size > 1 or attachment.shared is not None:
            return False
        weight = attachment.weight
        group = self.group_of(weight)
        if group is None or (group["momentum"] and self._lacks(weight, "shadow_momentum_buffer")):
            return False
        return all(self._may_be_fused(group, weight.device) for group in self.groups)

    def _may_be_fused(self, group: dict[str, Any], device: torch.device) -> bool:
        if group["foreach"] or group["fused"] is False:
            return False
        parameters = group["params"]
        if group["momentum"] and any(self._lacks(p, "momentum_buffer") for p in parameters):
            return False
        return all(
            p.device == device and p.dtype in _FUSED and p.is_contiguous() and _is_plain(p)
            for p in parameters
        )

    def _lacks(self, parameter: Tensor, key: str) -> bool:
        return self.read(parameter, key) is None

    def owns_all(self, module: nn.Module) -> bool:
        """Whether all trained parameters of a module are the optimizer's."""
        trained = (p for p in module.parameters() if p.requires_grad)
        return all(self.group_of(p) is not None for p in trained)

    def require_one_group(self, attachment: Attachment) -> None:
        """Check that layers decoupled together are moved by one and the same rule.

        Raises:
            ValueError: if their weights are in several parameter groups, or one in none.
        """
        for layer in attachment.layers.layers:
            self.require_own(attachment, layer.weight)
            if self.group_of(layer.weight) is not self.group_of(attachment.weight):
                raise ValueError(
                    f"DecoupledDescent: the weights of layers {attachment.layers.names}, which "
                    "read the same inputs and are decoupled together, must be in one parameter "
                    "group; give both one learning rate"
                )

    def require_own(self, attachment: Attachment, parameter: Tensor) -> None:
        """Check that a parameter of the model is the optimizer's.

        Raises:
            ValueError: if it is not.
        """
        if self.group_of(parameter) is not None:
            return
        name = next(n for n, p in attachment.module.named_parameters() if p is parameter)
        raise ValueError(
            f"DecoupledDescent: {name!r} is not among this optimizer's parameters; construct the "
            "optimizer with the parameters of this module, after what exchanges them (to_empty)"
        )


def _is_plain(parameter: Tensor) -> bool:
    """Whether a gradient, if there is one, lies in memory as its parameter does."""
    gradient = parameter.grad
    if gradient is None:
        return True
    dense = not gradient.is_sparse and gradient.dtype == parameter.dtype
    return dense and gradient.is_contiguous()
