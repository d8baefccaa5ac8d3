"""Which layers of a module are decoupled and corrected."""

from torch import nn

__all__ = ["find_head", "find_layer"]


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
