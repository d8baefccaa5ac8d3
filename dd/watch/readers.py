"""Other trained modules that read the decoupled layer's inputs, whose imprint no shadow removes."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dd.support.modes import modes_kept
from dd.support.weak_hook import WeakHook

__all__ = ["InputReaders"]

# Training forwards of the decoupled layer that are looked at, and rows of each.
_FORWARDS, _ROWS = 3, 3


class InputReaders:
    """Looks, in the first training forwards, for others that are trained on the layer's inputs.

    And in those after one is unfrozen.

    Args:
        module: the model.
        layers: the decoupled layers.
        layer_names: their dotted names.
        join: decouples another layer with them, by its name; returns whether it does.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Linear],
        layer_names: Sequence[str],
        join: Callable[[str, nn.Linear], bool],
    ) -> None:
        self._module, self._join = module, weakref.WeakMethod(join)
        self._layers, self._layer, self._layer_names = layers, layers[0], layer_names
        self._has_tried = False
        self._names = {id(part): name for name, part in module.named_modules()}
        self._others = [part for part in module.modules() if self._may_read(part)]
        self._seen: dict[int, Tensor] = {}
        self._trained: set[int] = set()
        self._forwards = 0

    def register(self) -> list[Any]:
        """Install the hooks; returns their handles."""
        hook = WeakHook(self.look)
        handles = [
            part.register_forward_pre_hook(hook, with_kwargs=True)
            for part in (self._layer, *self._others)
        ]
        if self._candidates():
            # Before all others of the model's own: its first training forward is to be run alike.
            before = WeakHook(self.before_training)
            handles.append(self._module.register_forward_pre_hook(before, with_kwargs=True))
        return handles

    def _candidates(self) -> list[nn.Linear]:
        """Layers that may take the same inputs."""
        return [
            part
            for part in self._others
            if type(part) is nn.Linear
            and part.in_features == self._layer.in_features
            and part.weight.requires_grad
        ]

    def before_training(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Run the first training forward in eval mode, and join the layers that read the inputs."""
        if self._has_tried or not module.training or not torch.is_grad_enabled():
            return
        self._has_tried = True
        candidates = self._candidates()
        seen: dict[nn.Module, Tensor] = {}

        def see(part: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].dim() > 1:
                seen[part] = _some(given[0])

        handles = [p.register_forward_pre_hook(see) for p in (self._layer, *candidates)]
        try:
            # What does not run in eval mode is looked at in training alone.
            with (
                modes_kept(module),
                contextlib.suppress(Exception),
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
            ):
                module.eval()(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        join, own = self._join(), seen.get(self._layer)
        for part in candidates:
            same = own is not None and part in seen and torch.equal(seen[part], own)
            if same and join is not None and join(self._names[id(part)], part):
                self._others = [other for other in self._others if other is not part]

    def look(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare what a module is given with what the decoupled layer is.

        Raises:
            RuntimeError: if it is the same.
        """
        if not (self._layer.training and torch.is_grad_enabled()):
            return
        self._look_anew_if_unfrozen()
        if self._forwards >= _FORWARDS:
            return
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1]
        if not given:
            return
        if part is self._layer:
            self._forwards += 1
            self._seen[id(part)] = _some(given[0])
            for other, rows in self._seen.items():
                self._compare(other, rows)
            self._seen = {id(part): self._seen[id(part)]}
            return
        if any(part is layer for layer in self._layers):
            return
        if not _is_trained(part):
            return
        for value in given:
            rows = _some(value)
            self._seen[id(part)] = rows
            self._compare(id(part), rows)

    def _look_anew_if_unfrozen(self) -> None:
        trained = {id(other) for other in self._others if _is_trained(other)}
        if not trained <= self._trained:
            self._forwards = 0
        self._trained = trained

    def _compare(self, other: int, rows: Tensor) -> None:
        own = self._seen.get(id(self._layer))
        if own is None or other == id(self._layer) or not _holds(rows, own):
            return
        self._seen = {}
        name = self._names[other]
        known = self._layer_names
        raise RuntimeError(
            f"DecoupledDescent: {name!r} is trained on the inputs of the decoupled layer "
            f"{known[0]!r} as well (side by side with it, or joined to its output). What samples "
            "leave in it is not corrected, so that the training error would be too low. If it is "
            f"an nn.Linear of the same inputs alone, decouple both: layer={[*known, name]}. Else "
            "let an nn.Linear of its own read the inputs; or freeze it (requires_grad_(False))."
        )

    def _may_read(self, part: nn.Module) -> bool:
        if any(part is layer for layer in self._layers):
            return False
        own = list(part.parameters(recurse=False))
        is_leaf = next(part.children(), None) is None or isinstance(part, nn.MultiheadAttention)
        return is_leaf and sum(p.numel() for p in own) >= self._layer.in_features


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


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
