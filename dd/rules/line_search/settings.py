"""What ``lr="auto"`` does not go with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "chooses_rate",
    "is_auto",
    "require_closure",
    "require_dense",
    "require_loss",
    "require_plain_rule",
    "stops_itself",
    "without_rates",
]

CLOSURE = """
    def closure():
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)  # all training samples, in train mode
        loss.backward()
        return loss
    optimizer.step(closure)"""

_PLAIN = {
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "decoupled_weight_decay": False,
    "maximize": False,
    "differentiable": False,
}


def chooses_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer was given ``lr="auto"``."""
    return getattr(optimizer, "_policy", None) is not None


def is_auto(lr: Any) -> bool:
    """Whether a learning rate is to be chosen at every step.

    Raises:
        ValueError: if it is any other string.
    """
    if isinstance(lr, str) and lr != "auto":
        raise ValueError(f'DecoupledDescent: lr must be a number or "auto", got {lr!r}')
    return isinstance(lr, str)


def stops_itself(stop: Any, *, searching: bool) -> bool:
    """Whether training stops by itself.

    Args:
        stop: as given to the constructor.
        searching: whether the learning rate is ``"auto"``.

    Raises:
        ValueError: if it is neither None nor "auto", or "auto" with a learning rate.
    """
    if stop not in (None, "auto"):
        raise ValueError(f'DecoupledDescent: stop must be None or "auto", got {stop!r}')
    if stop is not None and not searching:
        raise ValueError(
            'DecoupledDescent: stop="auto" needs lr="auto", whose steps go down from a known point '
            "on; with a rate the loss may rest on a plateau and fall again. Choose the step of the "
            'lowest training error afterwards, or use lr="auto"'
        )
    return stop is not None


def require_plain_rule(settings: Mapping[str, Any]) -> None:
    """Check that the update is a plain gradient step.

    Args:
        settings: of the constructor or of one parameter group.

    Raises:
        ValueError: if something else is asked for.
    """
    for name, plain in _PLAIN.items():
        if name in settings and bool(settings[name] != plain):
            raise ValueError(
                f'DecoupledDescent: lr="auto" chooses step and shrinkage by itself, on plain '
                f"gradient steps; got {name}={settings[name]}. Leave {name}={plain}, or give lr a "
                "number"
            )
    if settings.get("damping", 1.0) != 1.0:
        raise ValueError(
            f'DecoupledDescent: lr="auto" needs damping=1, got {settings["damping"]}; or give lr '
            "a number"
        )


def without_rates(params: Any) -> Any:
    """Parameters or groups of them, the groups' ``lr="auto"`` taken away.

    Raises:
        ValueError: if a group has another rate.
    """
    if isinstance(params, (nn.Module, Tensor)) or not isinstance(params, Iterable):
        return params
    result = []
    for group in params:
        if isinstance(group, dict) and "lr" in group:
            if not is_auto(group["lr"]):
                raise ValueError(
                    f'DecoupledDescent: lr="auto" chooses one step for all parameters, got a group '
                    f"with lr={group['lr']}; freeze what must not move (requires_grad_(False))"
                )
            group = {key: value for key, value in group.items() if key != "lr"}
        result.append(group)
    return result


def require_closure(closure: Any) -> None:
    """Check that there is a closure.

    Raises:
        ValueError: if there is none.
    """
    if closure is None:
        raise ValueError(
            'DecoupledDescent: lr="auto" evaluates the loss several times a step: call '
            f"step(closure), as for torch.optim.LBFGS:\n{CLOSURE}\n\nor give lr a number"
        )


def require_loss(loss: Any) -> None:
    """Check what the closure returned.

    Raises:
        TypeError: if it is not a tensor of one number.
        FloatingPointError: if it is not finite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dtype.is_complex:
        found = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise TypeError(
            'DecoupledDescent: with lr="auto" the closure must return the loss that it '
            f"differentiated, a tensor of one number; got {found}. It reads{CLOSURE}"
        )
    if not bool(torch.isfinite(loss.detach())):
        raise FloatingPointError(
            f"DecoupledDescent: the loss is {float(loss.detach())} before the step; nothing was "
            "updated. Likely causes: the inputs or targets contain NaN or infinity, or the initial "
            "weights are too large."
        )


def require_dense(parameters: Sequence[Tensor]) -> None:
    """Check that no gradient is sparse.

    Raises:
        RuntimeError: if one is.
    """
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise RuntimeError(
            'DecoupledDescent: lr="auto" takes dense gradients; construct the embedding with '
            "sparse=False, or give lr a number"
        )
