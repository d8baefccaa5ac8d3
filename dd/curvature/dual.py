"""Forward-mode derivatives that begin in a forward hook and end in the backward pass."""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._compile import _disable_dynamo

from dd.curvature.estimators import LOST_TANGENT, REMEDY
from dd.curvature.marked import UncompiledTensor

__all__ = ["DualLevel", "carry_tangent", "no_derivative", "split_tangent"]

# What torch loads at the first dual number, through a compiler of its own that it has deprecated.
_DECOMPOSITIONS = "torch._decomp.decompositions_for_jvp"

# Operations without a second derivative by either route.
_ONCE = ("hardsigmoid", "scaled_dot_product_flash")

_COMPONENTS = (
    "Where the inputs are a mixture of Gaussians, give the components of the samples: "
    'noise=dd.NoiseModel.isotropic(inputs, components) with curvature="stein", which needs no '
    "derivative beyond the gradient."
)


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
            raise NotImplementedError(no_derivative(error)) from error


def carry_tangent(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return ``primal`` as a dual number with the given tangent, inside an open level."""
    with _first_dual_number():
        dual = forward_ad.make_dual(primal, tangent)
    return dual.as_subclass(ProbedTensor)


def split_tangent(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor without its tangent, and the tangent where it has one."""
    dual = forward_ad.unpack_dual(tensor)
    return dual.primal, dual.tangent


def no_derivative(error: Exception) -> str:
    """What to say where an operation lacks a derivative that the curvature needs.

    Args:
        error: torch's own.
    """
    said = str(error).split("\n")[0]
    named = re.search(r"(?:forward AD with|derivative for) (?:aten::)?(\w+)", said)
    name = "" if named is None else re.sub(r"_(for|back)ward$", "", named[1])
    where = f"{name or 'an operation'}, between the decoupled layer and the loss,"
    if "margin_loss" in name and "soft_margin" not in name:
        return (
            f"DecoupledDescent: {where} has neither a forward-mode nor a second derivative in "
            "torch. The curvature of a hinge lies in its kink, which no such derivative sees "
            f"however the loss is written. {_COMPONENTS} Without them use a smoother loss: "
            "nn.CrossEntropyLoss, or the squared hinge written out, "
            "(1 - scores.gather(1, labels[:, None]) + scores).clamp_min(0).square().mean()."
        )
    if any(part in name for part in _ONCE) or "derivative for" in said:
        return (
            f"DecoupledDescent: the curvature needs a forward-mode or a second derivative, and "
            f"{where} has neither in torch ({said}). {_COMPONENTS} Writing the operation with "
            "elementary ones also works; for attention, "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
    return (
        f"DecoupledDescent: the curvature probe needs forward-mode derivatives, and {where} has "
        f"none in torch ({said}). {REMEDY} Writing the operation with elementary ones also works, "
        "for example ((output - target) ** 2).mean() for a mean square loss."
    )


@contextlib.contextmanager
def _first_dual_number() -> Iterator[None]:
    """Keep to itself what torch says to itself when it makes its first dual number."""
    # Leaving catch_warnings makes Python forget what it warned of before, so that it is entered no
    # more than once.
    if _DECOMPOSITIONS in sys.modules:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script.*", FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit\.script.*", DeprecationWarning)
        yield


def _require_tangent(loss: Tensor) -> None:
    if split_tangent(loss.as_subclass(Tensor))[1] is None:
        raise RuntimeError(LOST_TANGENT)


def _lacks_forward_mode(error: Exception) -> bool:
    # mse_loss does have a formula, which fails on the tangent that torch itself leaves out.
    signs = ("forward AD", "forward mode AD", "forward-mode AD", "ZeroTensors are immutable")
    return any(sign in str(error) for sign in signs)
