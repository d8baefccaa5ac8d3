"""The derivative of one optimizer step, coordinate by coordinate, by the optimizer's own code."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

__all__ = ["GRADIENT", "PARAMETER", "has_derivative", "names_of_linear_rules", "step_derivative"]

PARAMETER, GRADIENT = "parameter", "gradient"

# Act on every coordinate by itself, with a derivative; torch keeps it where it is asked to.
_RULES = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
)


def has_derivative(optimizer: optim.Optimizer) -> bool:
    """Whether steps of an optimizer can be differentiated."""
    return type(optimizer) in _RULES


def names_of_linear_rules() -> str:
    """The optimizers whose steps can be differentiated, for messages."""
    return ", ".join(rule.__name__ for rule in _RULES)


def step_derivative(
    optimizer: optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor
) -> dict[str, dict[str, Tensor]]:
    """How what a step leaves depends on what it is made from.

    Args:
        optimizer: one with :func:`has_derivative`, about to make the step.
        group: of the parameter.
        parameter: of any shape.
        gradient: that the step sees, of this shape.

    Returns:
        For the parameter after the step, and each tensor of its shape in the optimizer's state
        after it, the derivatives by the parameter, the gradient and each such tensor before the
        step; all of the parameter's shape, float64, without those that are zero throughout.
    """
    known = optimizer.state.get(parameter, {})
    given = {PARAMETER: parameter, GRADIENT: gradient}
    given |= {key: value for key, value in known.items() if _is_own(value, parameter)}
    leaves = {key: value.detach().double().requires_grad_() for key, value in given.items()}
    with torch.enable_grad():
        moved = leaves[PARAMETER].clone()
        moved.grad = leaves[GRADIENT].clone()
        state = {key: _copied(value) for key, value in known.items()}
        state |= {key: leaf.clone() for key, leaf in leaves.items() if key in known}
        twin = copy.copy(optimizer)
        twin.defaults = {**optimizer.defaults, "differentiable": True}
        kinds = {"foreach": False, "fused": False, "capturable": False, "differentiable": True}
        kinds = {key: value for key, value in kinds.items() if key in group}
        settings = {**_plain(group), **kinds}
        if settings.get("momentum") and isinstance(optimizer, optim.SGD) and not state:
            # The first step's buffer is the gradient itself, and torch cuts it off.
            state, settings["dampening"] = {"momentum_buffer": torch.zeros_like(moved)}, 0.0
        twin.param_groups = [{**settings, "params": [moved]}]
        twin.state = defaultdict(dict, {moved: state})
        twin.step()
        made = {PARAMETER: moved}
        found = twin.state[moved]
        made |= {key: value for key, value in found.items() if _is_own(value, parameter)}
    return {name: _derivatives(value, leaves) for name, value in made.items()}


def _derivatives(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {}
    # Of a sum over coordinates, each of which depends on the same one of every input.
    found = torch.autograd.grad(
        value.sum(), [*leaves.values()], retain_graph=True, allow_unused=True
    )
    # Where nothing has ever arrived, roots have no derivative, and nothing to pass on either.
    return {
        key: part.nan_to_num(0.0, 0.0, 0.0)
        for key, part in zip(leaves, found, strict=True)
        if part is not None
    }


def _is_own(value: Any, parameter: Tensor) -> bool:
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    return is_tensor and value.shape == parameter.shape and value.dim() > 0


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    # Counts of steps lie on a device where steps may be captured, in single precision.
    return (value.double() if value.is_floating_point() else value).detach().clone().cpu()


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(value) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }
