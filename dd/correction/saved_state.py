"""The state of an optimizer, as it is saved and restored."""

from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.noise.model import NoiseModel
from dd.samples.fitted import require_same_order

__all__ = [
    "attachment_settings",
    "bind_samples",
    "forget_own",
    "is_own",
    "require_no_shadow",
    "restore_values",
]


def is_own(key: str) -> bool:
    """Whether a key of a parameter's state is the correction's."""
    return "shadow" in key


def forget_own(optimizer: torch.optim.Optimizer) -> None:
    """Delete what the correction keeps in an optimizer's state."""
    for state in optimizer.state.values():
        for key in [k for k in state if is_own(k)]:
            del state[key]


def require_no_shadow(optimizer: torch.optim.Optimizer) -> None:
    """Check that the state of an optimizer that is not attached is a plain one.

    Raises:
        RuntimeError: if it holds shadows.
    """
    if any("shadow" in state for state in optimizer.state.values()):
        raise RuntimeError(
            "DecoupledDescent: this optimizer is not attached, but its state holds shadows. "
            "Call attach(module) to go on with them, or detach() to go on as plain SGD."
        )


def attachment_settings(
    attachment: Attachment,
) -> tuple[nn.Module, str | list[str], NoiseModel | None, dict[str, Any]]:
    """What an optimizer is attached to again: module, layer, noise model, and what was said."""
    left = attachment.has_left_head
    noise = attachment.given_noise if left else attachment.noise_of_all
    names = attachment.layers.names
    layer = names if attachment.layers.are_several else names[0]
    return attachment.module, layer, noise, attachment.oversight.state_dict()


def restore_values(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put every tensor of a loaded state back as it was saved.

    Args:
        optimizer: that has loaded it.
        state_dict: what it loaded.
    """
    # The base class casts every tensor of a state to the parameter's precision, or shares it
    # with the optimizer that it came from: the momentum would then move with both, apart from
    # the shadow's.
    saved = [p for group in state_dict["param_groups"] for p in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for key, parameter in zip(saved, own, strict=True):
        given = state_dict["state"].get(key, {})
        for name, value in given.items():
            if isinstance(value, Tensor):
                dtype = value.dtype if is_own(name) else optimizer.state[parameter][name].dtype
                value = value.to(parameter.device, dtype, copy=True)
                optimizer.state[parameter][name] = value


def bind_samples(
    attachment: Attachment, state: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Take up the samples of a loaded state, where none are known yet.

    Args:
        attachment: of the layer.
        state: of the decoupled weight.
        dtype: of the inputs, where known.

    Raises:
        ValueError: if they are not those of the noise model in their order.
    """
    values = state.get("shadow_samples")
    if attachment.samples.known is None and values is not None and not values.is_meta:
        require_same_order(values, attachment.given_noise, dtype)
        if dtype is not None:
            attachment.samples.resume(values)
