"""Which layers of a module are decoupled and corrected."""

import re

from torch import nn

__all__ = ["find_head", "find_layer", "input_changing_modules"]

# Names that people give to layers which draw at random.
_RANDOM = re.compile(r"noise|drop|augment|random|jitter|mixup|cutout|erasing", re.IGNORECASE)


def find_layer(module: nn.Module, layer: nn.Module | str | None) -> tuple[str, nn.Linear]:
    """Choose the decoupled layer.

    Args:
        module: the model.
        layer: the layer, its dotted name, or None for the first :class:`torch.nn.Linear` with
            trainable weights in the order of ``module.named_modules()``.

    Returns:
        The layer's dotted name and the layer.

    Raises:
        ValueError: if there is no such layer.
        TypeError: if the layer is not an ``nn.Linear``.
    """
    if layer is None:
        for name, candidate in _linear_layers(module):
            if candidate.weight.requires_grad:
                return name, candidate
        raise ValueError(
            f"DecoupledDescent: {type(module).__name__} has no nn.Linear with trainable weights "
            "to decouple; use torch.optim.SGD for this model"
        )
    return _chosen(module, layer, "layer")


def find_head(
    module: nn.Module, layer: nn.Linear, choice: bool | nn.Module | str
) -> tuple[str, nn.Linear]:
    """Choose the head, the linear layer that computes the scores.

    Args:
        module: the model.
        layer: the decoupled layer.
        choice: the head, its dotted name, or True for the last :class:`torch.nn.Linear` in the
            order of ``module.named_modules()``.

    Returns:
        The head's dotted name and the head.

    Raises:
        ValueError: if there is no such layer, it is the decoupled one, or its weight is frozen.
        TypeError: if it is not an ``nn.Linear``.
    """
    name, head = _linear_layers(module)[-1] if choice is True else _chosen(module, choice, "head")
    if head is layer:
        raise ValueError(
            f"DecoupledDescent: the decoupled layer {name!r} is the model's last linear layer, so "
            "there is no head to correct; use head=False"
        )
    if not isinstance(head.weight, nn.Parameter) or not head.weight.requires_grad:
        raise ValueError(
            f"DecoupledDescent: the weight of head {name!r} must be a trainable parameter of its "
            "own (not frozen, not parametrised); use head=False for a fixed head"
        )
    return name, head


def input_changing_modules(module: nn.Module, name: str, layer: nn.Module) -> str:
    """Say what changes a layer's inputs from step to step in train mode.

    Args:
        module: the model, of which ``named_modules()`` is taken for the order of the forward pass.
        name: of the layer.
        layer: the layer.

    Returns:
        A sentence after a space, or nothing.
    """
    found = []
    for other, one in module.named_modules():
        if one is layer:
            break
        if one.training and next(one.children(), None) is None and _changes(one):
            found.append(f"{other!r} ({type(one).__name__})")
    if not found:
        return ""
    return (
        f" Found before layer {name!r}: {', '.join(found)}, which in train mode gives a sample "
        "another input at every step. Put it behind the layer, or keep it in eval mode: call its "
        "eval() after every model.train(), and before NoiseModel.fit."
    )


def _changes(module: nn.Module) -> bool:
    """Whether a module's output for a sample depends on other samples, or on chance."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU):
        return True
    if getattr(module, "p", 1) == 0:
        return False
    return _RANDOM.search(type(module).__name__) is not None


def _linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def _chosen(module: nn.Module, choice: nn.Module | str | bool, role: str) -> tuple[str, nn.Linear]:
    """Return the linear layer that is meant by a module or its dotted name.

    Raises:
        ValueError: if it is not part of the model.
        TypeError: if it is not an ``nn.Linear``.
    """
    found = [(name, m) for name, m in module.named_modules() if m is choice or name == choice]
    if not found:
        linear = [name for name, _ in _linear_layers(module)]
        raise ValueError(
            f"DecoupledDescent: {role}={choice!r} is not part of the model; its linear layers are "
            f"{linear}"
        )
    name, layer = found[0]
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"DecoupledDescent: {role} {name!r} is a {type(layer).__name__}; expected nn.Linear"
        )
    return name, layer
