"""Forward-mode derivatives that begin in a forward hook and end in the backward pass."""

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._compile import _disable_dynamo

from dd.curvature import LOST_TANGENT, REMEDY
from dd.marked import UncompiledTensor

__all__ = ["DualLevel", "carry_tangent", "split_tangent"]


class DualLevel:
    """A share in torch's single forward-mode level, which closes with its last holder.

    Torch allows one level at a time, so several optimizers in one loop share it, and a level that
    the caller opened is used and left open.
    """

    _holders: ClassVar[int] = 0
    _owned: ClassVar[bool] = False

    def __init__(self) -> None:
        self._held = True
        if DualLevel._holders == 0:
            with contextlib.suppress(RuntimeError):
                forward_ad.enter_dual_level()
                DualLevel._owned = True
        DualLevel._holders += 1

    @classmethod
    def is_open(cls) -> bool:
        """Whether any share is held."""
        return cls._holders > 0

    def close(self) -> None:
        """Give the share back; every tangent is dropped with the last one."""
        if not self._held:
            return
        self._held = False
        DualLevel._holders -= 1
        if DualLevel._holders == 0 and DualLevel._owned:
            DualLevel._owned = False
            forward_ad.exit_dual_level()

    def __del__(self) -> None:
        """Close, so that an abandoned forward pass leaves no level open."""
        # At the interpreter's end torch may be gone already.
        with contextlib.suppress(AttributeError, TypeError):
            self.close()


class ProbedTensor(UncompiledTensor):
    """A tensor that carries a curvature probe and explains where the probe cannot pass.

    It is an ordinary tensor to every operation; only the error of an operation without
    forward-mode derivatives is replaced by one that names the remedy.
    """

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``.

        Raises:
            NotImplementedError: if an operation has no forward-mode derivative.
            RuntimeError: if a loss without tangent is differentiated, and whatever else ``func``
                raises.
        """
        if func is Tensor.backward and DualLevel.is_open():
            _require_tangent(args[0])
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:  # NotImplementedError is one
            if not _lacks_forward_mode(error):
                raise
            raise NotImplementedError(
                "DecoupledDescent: the curvature probe needs forward-mode derivatives, and an "
                f"operation between the decoupled layer and the loss has none ({error}). {REMEDY} "
                "Writing the operation with elementary ones also works, for example "
                "((output - target) ** 2).mean() for a mean square loss."
            ) from error


def carry_tangent(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return ``primal`` as a dual number with the given tangent, inside an open level."""
    return forward_ad.make_dual(primal, tangent).as_subclass(ProbedTensor)


def split_tangent(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor without its tangent, and the tangent where it has one."""
    dual = forward_ad.unpack_dual(tensor)
    return dual.primal, dual.tangent


def _require_tangent(loss: Tensor) -> None:
    if split_tangent(loss.as_subclass(Tensor))[1] is None:
        raise RuntimeError(LOST_TANGENT)


def _lacks_forward_mode(error: Exception) -> bool:
    # mse_loss does have a formula, which fails on the tangent that torch itself leaves out.
    signs = ("forward AD", "forward mode AD", "forward-mode AD", "ZeroTensors are immutable")
    return any(sign in str(error) for sign in signs)
