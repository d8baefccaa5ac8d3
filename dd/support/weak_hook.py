"""A hook on a module that does not outlive whoever looks, and does nothing for a copy."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo

__all__ = ["WeakHook"]


class WeakHook:
    """Lets a method see what a module is given; inert in compiled code and in copies.

    Args:
        method: of an owner that may be forgotten; None for an inert hook.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    @property
    def is_inert(self) -> bool:
        """Whether the hook never had a method."""
        return self._method is None

    @property
    def method(self) -> Callable[..., Any] | None:
        """The method, as long as its owner lives."""
        return None if self._method is None else self._method()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakHook":
        """Return an inert hook."""
        return type(self)()

    def __reduce__(self) -> tuple[type["WeakHook"], tuple[()]]:
        """Pickle as an inert hook."""
        return type(self), ()

    def __call__(self, *arguments: Any) -> Any:
        """Tell the owner, if it lives."""
        if self.is_inert or torch.compiler.is_compiling():
            return
        self._tell(*arguments)

    @_disable_dynamo
    def _tell(self, *arguments: Any) -> None:
        method = self.method
        if method is not None:
            method(*arguments)
