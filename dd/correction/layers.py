"""Which layers of a module are decoupled and corrected."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DecoupledLayers", "find_head", "find_layer", "find_layers", "input_changing_modules"]

# Names that people give to layers which draw at random.
_RANDOM = re.compile(r"noise|drop|augment|random|jitter|mixup|cutout|erasing", re.IGNORECASE)


class DecoupledLayers:
    """The decoupled layer, or several that read the same inputs and are one of all their columns.

    Args:
        names: dotted names.
        layers: in the order of their columns.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Linear]) -> None:
        self.names, self.layers = list(names), list(layers)
        self._waiting: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __contains__(self, layer: object) -> bool:
        """Whether a layer is one of them."""
        return any(layer is each for each in self.layers)

    def join(self, name: str, layer: nn.Linear) -> None:
        """Take in one more."""
        self.names.append(name)
        self.layers.append(layer)
        self.own_weights()

    def own_weights(self) -> list[nn.Parameter]:
        """The decoupled weights.

        Raises:
            ValueError: if one is not a plain parameter.
        """
        pairs = zip(self.names, self.layers, strict=True)
        return [_own_weight(name, layer) for name, layer in pairs]

    @property
    def are_several(self) -> bool:
        """Whether there are more than one."""
        return len(self.layers) > 1

    @property
    def width(self) -> int:
        """Columns of all together, k."""
        return sum(layer.out_features for layer in self.layers)

    @property
    def weight(self) -> Tensor:
        """Wᵀ of all, shape (k, d), detached."""
        weights = [layer.weight.detach() for layer in self.layers]
        return torch.cat(weights) if self.are_several else weights[0]

    @property
    def gradient(self) -> Tensor | None:
        """∂L/∂weight of all, shape (k, d), or None where one has none."""
        found = [layer.weight.grad for layer in self.layers]
        gradients = [gradient for gradient in found if gradient is not None]
        if len(gradients) < len(found):
            return None
        return torch.cat(gradients) if self.are_several else gradients[0]

    def outputs(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """What all of them make of the inputs that one of them has run on, shape (..., k).

        Raises:
            RuntimeError: if one of them has not run on the inputs of another.
        """
        if self._waiting:
            name = self.names[next(i for i, e in enumerate(self.layers) if e in self._waiting)]
            self._waiting.clear()
            raise RuntimeError(_apart(name))
        parts = [
            output if each is layer else F.linear(inputs, each.weight, each.bias)
            for each in self.layers
        ]
        return torch.cat(parts, -1)

    def split(self, layer: nn.Module, inputs: Tensor, found: Tensor) -> Tensor:
        """The columns of one of them; those of the others wait until these run."""
        parts = found.split([each.out_features for each in self.layers], -1)
        pairs = list(zip(self.layers, parts, strict=True))
        self._waiting = {each: (inputs, part) for each, part in pairs if each is not layer}
        return next(part for each, part in pairs if each is layer)

    def waiting(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """The columns of a layer that another has run for, or None.

        Raises:
            RuntimeError: if that was on other inputs.
        """
        if layer not in self._waiting:
            return None
        known, part = self._waiting.pop(layer)
        if known.shape != inputs.shape or (
            known.data_ptr() != inputs.data_ptr() and not torch.equal(known, inputs)
        ):
            self._waiting.clear()
            raise RuntimeError(
                _apart(next(n for n, e in zip(self.names, self.layers, strict=True) if e is layer))
            )
        return part

    def drop(self) -> None:
        """Forget what waits."""
        self._waiting.clear()


def _own_weight(name: str, layer: nn.Linear) -> nn.Parameter:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        raise ValueError(
            f"DecoupledDescent: the weight of layer {name!r} must be a trainable "
            "parameter of its own (not frozen, not parametrised, not flattened by FSDP)"
        )
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"DecoupledDescent: the weight of layer {name!r} is a "
            f"{type(weight.data).__name__}; fully_shard (FSDP) and tensor parallelism split "
            "the decoupled weight over processes, and every process needs all of it. Use "
            "DistributedDataParallel, or leave this layer out of the sharding."
        )
    return weight


def _apart(name: str) -> str:
    return (
        f"DecoupledDescent: layer {name!r} did not run, once, on the inputs of the layers that it "
        "is decoupled with; let each training forward run all of them on the same inputs"
    )


def find_layers(module: nn.Module, layer: object) -> DecoupledLayers:
    """Choose the decoupled layers.

    Args:
        module: the model.
        layer: as of :func:`find_layer`; or a list of layers that read the same inputs.

    Raises:
        ValueError: if there is no such layer, or one takes other inputs than the first.
        TypeError: if one is not an ``nn.Linear``.
    """
    if not isinstance(layer, list | tuple):
        name, found = find_layer(module, layer)  # type: ignore[arg-type]
        return DecoupledLayers([name], [found])
    pairs = [_chosen(module, each, "layer") for each in layer]
    if len({id(each) for _, each in pairs}) < max(len(pairs), 1):
        raise ValueError(f"DecoupledDescent: layer={layer!r} must name layers, each once")
    widths = {each.in_features for _, each in pairs}
    if len(widths) > 1:
        raise ValueError(
            "DecoupledDescent: layers that are decoupled together read the same inputs, but these "
            f"take {sorted(widths)} of them"
        )
    return DecoupledLayers([name for name, _ in pairs], [each for _, each in pairs])


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
