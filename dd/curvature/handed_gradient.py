"""Recorded gradients as users' hooks get them: to all appearances such as are not recorded."""

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dd.curvature.transparent_tensor import UncompiledTensor

__all__ = ["HandedGradient", "RecordedPass"]


class HandedGradient(UncompiledTensor):
    """A tensor outside of every graph, whose operations are recorded behind its back.

    What is computed of it is handed likewise. Once its backward pass has ended it is an ordinary
    tensor, and keeps no graph.
    """

    _pass: "RecordedPass"
    _recorded: Tensor | None = None

    @classmethod
    def of(cls, recorded: Tensor, owner: "RecordedPass") -> Self:
        """Hand on a tensor of a graph."""
        # The very tensor, of which an operation in place must change the history.
        found = recorded.detach().as_subclass(cls)
        found._recorded, found._pass = recorded, owner
        return found

    @property
    def is_live(self) -> bool:
        """Whether its backward pass goes on."""
        return self._recorded is not None

    @property
    def recorded(self) -> Tensor:
        """The tensor of the graph, or an ordinary one once there is none."""
        return self.as_subclass(Tensor) if self._recorded is None else self._recorded

    def end(self) -> None:
        """Become an ordinary tensor."""
        self._recorded = None

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func`` as it runs in a pass without graph, and record it where gradients go in."""
        live = [item for item in _handed_in((args, kwargs)) if item.is_live]
        name = getattr(func, "__name__", "")
        if name in _OF_THE_TENSOR or func in _LEAVING or func in _BEGINS_A_GRAPH:
            return cls._run_itself(func, live, args, kwargs)
        target = args[0] if args and _works_in_place(name) else kwargs.get("out")
        if not live or _is_of_others(target):
            # A user's own tensor does not enter the graph.
            args, kwargs = tree_map_only(cls, lambda item: item.as_subclass(Tensor), (args, kwargs))
            return func(*args, **kwargs)
        if func in _DETACH_ITSELF:
            return args[0]
        if func in _DETACH:
            return live[0]._pass.hand(live[0].recorded)
        if func in _UNBIND:
            return _unbound(*args, **kwargs)
        with torch.enable_grad():
            if kwargs.get("out") is not None:
                # Torch does not record what it writes to a given place.
                return target.copy_(func(*args, **{**kwargs, "out": None}))
            args, kwargs = tree_map_only(cls, lambda item: item.recorded, (args, kwargs))
            found = func(*args, **kwargs)
        known = {id(item.recorded): item for item in live}
        owner = live[0]._pass
        return tree_map_only(
            Tensor, lambda item: known[id(item)] if id(item) in known else owner.hand(item), found
        )

    @classmethod
    def _run_itself(cls, func: Any, live: list[Self], args: Any, kwargs: Any) -> Any:
        """Run what regards this tensor and no graph, such as its attributes."""
        if func == _SET_DATA and live and live[0] is args[0]:
            args[0].copy_(args[1])
            return None
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if live and func in _BEGINS_A_GRAPH:
            live[0].end()
        if not live or func == _GRAD or not isinstance(found, Tensor) or found is live[0]:
            return found
        with torch.enable_grad():
            recorded = live[0].recorded if func == _DATA else func(live[0].recorded)
        return live[0]._pass.hand(recorded)


class RecordedPass:
    """One recorded backward pass, for as long as gradients of it are handed to hooks."""

    def __init__(self) -> None:
        self._handed: list[weakref.ref[HandedGradient]] = []

    def hand(self, recorded: Tensor) -> HandedGradient:
        """Return what a hook gets of a tensor of the graph."""
        found = HandedGradient.of(recorded, self)
        self._handed.append(weakref.ref(found))
        return found

    def end(self) -> None:
        """Make ordinary tensors of all that was handed."""
        for reference in self._handed:
            found = reference()
            if found is not None:
                found.end()
        self._handed.clear()


_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_GRAD = Tensor.grad.__get__  # type: ignore[union-attr]
_OF_THE_TENSOR = {"__get__", "__set__", "__delete__"}
# Users differentiate by themselves from there on.
_BEGINS_A_GRAPH = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_LEAVING = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__, Tensor.share_memory_}
_DETACH, _DETACH_ITSELF = {Tensor.detach, torch.detach}, {Tensor.detach_, torch.detach_}
_UNBIND = {Tensor.unbind, torch.unbind}
_ASSIGNS = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__iand__",
    "__ior__",
    "__ixor__",
    "__ilshift__",
    "__irshift__",
}


def _unbound(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    # Of several views at once torch lets none be changed in place where a graph is made.
    return tuple(input.select(dim, index) for index in range(input.shape[dim]))


def _works_in_place(name: str) -> bool:
    return name in _ASSIGNS or (name.endswith("_") and not name.endswith("__"))


def _handed_in(given: Any) -> list[HandedGradient]:
    return [item for item in tree_leaves(given) if isinstance(item, HandedGradient)]


def _is_of_others(target: Any) -> bool:
    """Whether a tensor that is changed, or one of several, is not handed in this pass."""
    return any(
        isinstance(item, Tensor) and not (isinstance(item, HandedGradient) and item.is_live)
        for item in tree_leaves(target)
    )
