"""Users' hooks in a backward pass that is recorded: called as ever, with plain gradients."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, SupportsIndex

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import BackwardHook

from dd.curvature.transparent_tensor import UncompiledTensor

__all__ = ["WatchedHook", "keep_gradient", "quiet", "silenced", "watch_module_hooks"]


class HandedGradient(UncompiledTensor):
    """A recorded gradient as a hook gets it: to all appearances one that is not recorded."""

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``; what leaves torch leaves the graph."""
        if func == _REQUIRES_GRAD:
            return False
        if func in _LEAVING:
            args = (args[0].as_subclass(Tensor).detach(), *args[1:])
            return func(*args, **kwargs)
        return super()._run(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy as an ordinary tensor."""
        return self.as_subclass(Tensor).detach().clone()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle as an ordinary tensor."""
        return self.as_subclass(Tensor).detach().__reduce_ex__(protocol)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_LEAVING = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__, Tensor.share_memory_}


class WatchedHook:
    """A user's hook, which sees a gradient once, and second derivatives never.

    Args:
        hook: takes gradients, or a module and gradients.
    """

    _is_quiet: ClassVar[bool] = False

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    @_disable_dynamo
    def __call__(self, *args: Any) -> Any:
        """Call the hook, unless second derivatives pass."""
        if WatchedHook._is_quiet:
            return None
        # In a pass that is recorded what the hook makes of a gradient is recorded, too.
        found = self._hook(*tree_map_only(Tensor, _handed, args))
        return tree_map_only(HandedGradient, lambda gradient: gradient.as_subclass(Tensor), found)


@contextmanager
def quiet() -> Iterator[None]:
    """Call no watched hook for a while."""
    before, WatchedHook._is_quiet = WatchedHook._is_quiet, True
    try:
        yield
    finally:
        WatchedHook._is_quiet = before


@contextmanager
def silenced(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Call no hook of these parameters for a while."""
    kept = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, own in kept:
        hooks.update(dict.fromkeys(own, _nothing))
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


def keep_gradient(tensor: Tensor) -> None:
    """What ``retain_grad`` does, for a tensor whose gradient is recorded."""
    place, has_kept = weakref.ref(tensor), False

    def keep(gradient: Tensor) -> None:
        nonlocal has_kept
        kept = place()
        if kept is None:
            return
        # To look for a gradient where there is none yet makes torch warn.
        earlier = kept.grad if has_kept else None
        kept.grad = gradient.detach().clone() if earlier is None else earlier + gradient.detach()
        has_kept = True

    tensor.register_hook(WatchedHook(keep))


def watch_module_hooks() -> None:
    """Where a module's full backward hooks are about to be bound to a tensor, watch them.

    To be called when somebody asks a tensor whether it requires a gradient, as torch does then.
    """
    # Torch has no other place at which these can be met: that of a module which has begun its
    # forward before the decoupled layer are collected already.
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_code is _BINDS:
            bound = frame.f_locals.get("self")
            for name in ("user_hooks", "user_pre_hooks"):
                hooks = getattr(bound, name, ())
                if any(not isinstance(hook, WatchedHook) for hook in hooks):
                    setattr(bound, name, [_watched(hook) for hook in hooks])
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


_BINDS = BackwardHook._apply_on_tensors.__code__
# Frames of our own between torch's and the above.
_DEPTH = 6


def _watched(hook: Callable[..., Any]) -> WatchedHook:
    return hook if isinstance(hook, WatchedHook) else WatchedHook(hook)


def _handed(gradient: Tensor) -> Tensor:
    return gradient.as_subclass(HandedGradient) if gradient.requires_grad else gradient


def _nothing(*_: Any) -> None:
    return None
