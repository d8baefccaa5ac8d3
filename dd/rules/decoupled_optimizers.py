"""Which of several optimizers moves the decoupled weight, and whether its steps can be followed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.tracker import Tracker
from dd.rules.step_hooks import inner_optimizer

__all__ = ["owner_of"]

_REFUSED = {
    torch.optim.LBFGS: "it evaluates its closure several times a step; "
    'dd.DecoupledDescent(model, lr="auto") searches along its steps too',
    torch.optim.SparseAdam: "it takes sparse gradients, which a linear layer does not have",
}


def owner_of(
    attachment: Attachment, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[torch.optim.Optimizer, list[torch.optim.Optimizer]]:
    """The optimizer that holds the decoupled weight, and all of them without their wrappers.

    Args:
        attachment: of the layer.
        optimizers: that train the model.

    Raises:
        TypeError: if one is no optimizer.
        ValueError: if none or several hold the weight, or the one that does cannot be followed.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "dd.decouple: expected torch.optim.Optimizer objects after the module, got "
                f"{type(optimizer).__name__}"
            )
    found = [inner_optimizer(optimizer) for optimizer in optimizers]
    owners = [optimizer for optimizer in found if _holds(optimizer, attachment.weight)]
    if len(owners) != 1:
        who = "none of the optimizers holds" if not owners else f"{len(owners)} optimizers hold"
        raise ValueError(
            f"dd.decouple: {who} the weight of layer {attachment.name!r}; give the optimizer that "
            "was constructed with this model's parameters, or name another layer with layer="
        )
    (owner,) = owners
    _require_followed(owner)
    return owner, found


def _holds(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    return any(p is weight for group in optimizer.param_groups for p in group["params"])


def _require_followed(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise ValueError(f"dd.decouple: {name} cannot be followed: {reason}")
    if isinstance(optimizer, Tracker):
        raise ValueError(
            f"dd.decouple: {name} corrects the model by itself; call its attach(model) in place of "
            "dd.decouple"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"dd.decouple: {name} with differentiable=True keeps the graph of its steps, which "
            "the correction has no part in; construct it without"
        )
