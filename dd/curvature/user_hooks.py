"""Users' hooks in a backward pass that is recorded: called as ever, with plain gradients."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import BackwardHook

from dd.curvature.custom import CurvatureWarning
from dd.curvature.handed_gradient import HandedGradient, RecordedPass
from dd.support.user_warning import warn_user

__all__ = [
    "WatchedHook",
    "keep_gradient",
    "quiet",
    "recording",
    "register_hook",
    "silenced",
    "told_node",
    "watch_module_hooks",
]


class WatchedHook:
    """A user's hook, which sees a gradient once, and second derivatives never.

    Args:
        hook: takes gradients, or a module and gradients.
    """

    _is_quiet: ClassVar[bool] = False
    _recording: ClassVar[RecordedPass | None] = None

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    @_disable_dynamo
    def __call__(self, *args: Any) -> Any:
        """Call the hook, unless second derivatives pass."""
        if WatchedHook._is_quiet:
            return None
        recording = WatchedHook._recording
        return self._hook(*args) if recording is None else self._recorded(recording, args)

    def _recorded(self, recording: RecordedPass, args: Any) -> Any:
        """Call it as in a pass without graph; what it makes of a gradient is recorded, too."""
        given = tree_map_only(Tensor, _plain, args)
        with torch.no_grad():
            found = self._hook(*tree_map_only(Tensor, recording.hand, given))
        depends = any(isinstance(g, Tensor) and g.requires_grad for g in tree_leaves(given))
        return tree_map_only(Tensor, _returned if depends else _plain, found)


def _plain(gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        if isinstance(gradient, HandedGradient):
            gradient = gradient.recorded
        return gradient if type(gradient) is Tensor else gradient.as_subclass(Tensor)


def _returned(gradient: Tensor) -> Tensor:
    is_followed = isinstance(gradient, HandedGradient) and gradient.is_live
    if not is_followed and bool(gradient.detach().count_nonzero()):
        warn_user(
            "DecoupledDescent: a hook between the decoupled layer and the loss returned a gradient "
            "that it did not make of the one it was given by operations of torch. The curvature "
            "takes it for a constant, so that it, and with it the training error, may be wrong. "
            'Compute it with operations of torch, or use curvature="stein" with the components of '
            "the samples.",
            CurvatureWarning,
        )
    return _plain(gradient)


@contextmanager
def recording() -> Iterator[None]:
    """Hand recorded gradients to watched hooks for a while."""
    before, WatchedHook._recording = WatchedHook._recording, RecordedPass()
    try:
        yield
    finally:
        WatchedHook._recording.end()
        WatchedHook._recording = before


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


def register_hook(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    """What ``Tensor.register_hook`` does, for a tensor whose gradient is recorded."""
    handle = tensor.register_hook(WatchedHook(hook))
    kept = _kept(tensor)
    if kept is not None:
        # What is kept is what the last hook leaves.
        hooks: Any = tensor._backward_hooks
        hooks[kept] = hooks.pop(kept)
    return handle


def keep_gradient(tensor: Tensor) -> None:
    """What ``retain_grad`` does, for a tensor whose gradient is recorded."""
    if tensor.retains_grad or _kept(tensor) is not None:
        return
    place, has_kept = weakref.ref(tensor), False

    def keep(gradient: Tensor) -> None:
        nonlocal has_kept
        kept = place()
        if kept is None:
            return
        values = gradient.as_subclass(Tensor).detach()
        # To look for a gradient where there is none yet makes torch warn.
        earlier = kept.grad if has_kept else None
        kept.grad = values.clone() if earlier is None else earlier + values
        has_kept = True

    tensor.register_hook(_KeepingHook(keep))


class _KeepingHook(WatchedHook):
    """What keeps a gradient for the user."""


def _kept(tensor: Tensor) -> int | None:
    hooks = tensor._backward_hooks or {}
    return next((key for key, hook in hooks.items() if isinstance(hook, _KeepingHook)), None)


def watch_module_hooks() -> None:
    """Where a module's full backward hooks are about to be bound to a tensor, watch them.

    To be called when somebody asks a tensor whether it requires a gradient, as torch does then.
    """
    # Torch has no other place at which these can be met: that of a module which has begun its
    # forward before the decoupled layer are collected already.
    frame = _nearest(_BINDS)
    bound = None if frame is None else frame.f_locals.get("self")
    for name in ("user_hooks", "user_pre_hooks"):
        hooks = getattr(bound, name, ())
        if any(not isinstance(hook, WatchedHook) for hook in hooks):
            setattr(bound, name, [_watched(hook) for hook in hooks])


def told_node(node: Any) -> Any:
    """Where hooks of ``Module.register_backward_hook`` are about to be bound, watch them.

    To be called when somebody asks a tensor for its node, as torch does then.

    Args:
        node: of a marked tensor.

    Returns:
        What to tell of it: there the node of the operation itself, not that of its mark.
    """
    frame = _nearest(_CALLS, _COMPARES)
    if frame is None or node is None:
        return node
    parent = node.next_functions[0][0]
    if frame.f_code is _COMPARES:
        return parent if parent is frame.f_locals.get("grad_fn") else node
    hooks = frame.f_locals.get("non_full_backward_hooks")
    if not hooks:
        return node
    hooks[:] = [_watched(hook) for hook in hooks]
    return parent


def _nearest(*codes: CodeType | None) -> FrameType | None:
    """The innermost call of one of several functions that is under way, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


_BINDS = BackwardHook._apply_on_tensors.__code__
_COMPARES = nn.Module._maybe_warn_non_full_backward_hook.__code__
_CALLS = next(
    (
        constant
        for constant in nn.Module._call_impl.__code__.co_consts
        if isinstance(constant, CodeType) and "non_full_backward_hooks" in constant.co_varnames
    ),
    None,
)


def _watched(hook: Callable[..., Any]) -> WatchedHook:
    return hook if isinstance(hook, WatchedHook) else WatchedHook(hook)


def _nothing(*_: Any) -> None:
    return None
