"""Tensors of a class of their own that nobody notices."""

import copy
from collections.abc import Callable
from typing import Any, SupportsIndex

from torch import Tensor
from torch._compile import _disable_dynamo

__all__ = ["TransparentTensor", "UncompiledTensor"]


class TransparentTensor(Tensor):
    """A tensor whose results are of its class, and that is printed, saved and copied as plain."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` as :meth:`_run` does."""
        return cls._run(func, types, args, kwargs or {})

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``; what is detached is plain."""
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) if func is Tensor.detach else result

    def __format__(self, spec: str) -> str:
        """Format as an ordinary tensor."""
        return format(self.as_subclass(Tensor).detach(), spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Print as an ordinary tensor."""
        return repr(self.as_subclass(Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy as an ordinary tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class UncompiledTensor(TransparentTensor):
    """A transparent tensor that ``torch.compile`` leaves alone."""

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` as :meth:`_run` does, out of the compiler's sight."""
        return cls._run(func, types, args, kwargs or {})
