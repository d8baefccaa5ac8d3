"""Other trained modules that read the decoupled layer's inputs, whose imprint no shadow removes."""

from typing import Any

import torch
from torch import Tensor, nn

from dd.support.weak_hook import WeakHook

__all__ = ["InputReaders"]

# Training forwards of the decoupled layer that are looked at, and rows of each.
_FORWARDS, _ROWS = 3, 3


class InputReaders:
    """Looks, in the first training forwards, for others that are trained on the layer's inputs.

    Args:
        module: the model.
        layer: the decoupled layer.
        name: its dotted name.
    """

    def __init__(self, module: nn.Module, layer: nn.Linear, name: str) -> None:
        self._layer, self._name = layer, name
        self._names = {id(part): name for name, part in module.named_modules()}
        self._others = [part for part in module.modules() if self._may_read(part)]
        self._seen: dict[int, Tensor] = {}
        self._forwards = 0

    def register(self) -> list[Any]:
        """Install the hooks; returns their handles."""
        hook = WeakHook(self.look)
        hooked = [self._layer, *self._others]
        return [part.register_forward_pre_hook(hook, with_kwargs=True) for part in hooked]

    def look(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare what a module is given with what the decoupled layer is.

        Raises:
            RuntimeError: if it is the same.
        """
        if self._forwards >= _FORWARDS or not (self._layer.training and torch.is_grad_enabled()):
            return
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1]
        if part is self._layer:
            self._forwards += 1
            self._seen[id(part)] = _some(given[0])
            for other, rows in self._seen.items():
                self._compare(other, rows)
            self._seen = {id(part): self._seen[id(part)]}
            return
        if not any(parameter.requires_grad for parameter in part.parameters()):
            return
        for value in given:
            rows = _some(value)
            self._seen[id(part)] = rows
            self._compare(id(part), rows)

    def _compare(self, other: int, rows: Tensor) -> None:
        own = self._seen.get(id(self._layer))
        if own is None or other == id(self._layer) or not _holds(rows, own):
            return
        self._seen = {}
        raise RuntimeError(
            f"DecoupledDescent: {self._names[other]!r} is trained on the inputs of the decoupled "
            f"layer {self._name!r} as well (side by side with it, or joined to its output). What "
            "samples leave in it is not corrected, so that the training error would be too low. "
            "Let one nn.Linear read the inputs, with as many outputs as both, and split its output "
            "(torch.split); or freeze the other one (requires_grad_(False))."
        )

    def _may_read(self, part: nn.Module) -> bool:
        if part is self._layer:
            return False
        own = list(part.parameters(recurse=False))
        is_leaf = next(part.children(), None) is None or isinstance(part, nn.MultiheadAttention)
        return is_leaf and sum(p.numel() for p in own) >= self._layer.in_features


def _some(inputs: Tensor) -> Tensor:
    """A few rows of a module's inputs, shape (r, d)."""
    rows = inputs.detach().flatten(0, -2)
    if len(rows) == 0:
        return rows
    index = torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long()
    return rows[index.to(rows.device)]


def _holds(rows: Tensor, own: Tensor) -> bool:
    """Whether rows (r, e) hold others, shape (r, d), in neighbouring columns."""
    width = own.shape[1]
    if len(rows) != len(own) or rows.shape[1] < width or rows.device != own.device:
        return False
    # One column, or none that varies, may be equal by chance.
    if width < 2 or len(own) == 0 or not bool((own != own[:, :1]).any()):
        return False
    windows = rows.unfold(1, width, 1)
    return bool((windows == own.unsqueeze(1)).all(2).all(0).any())
