"""Operations that torch differentiates once alone, exchanged for others."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dd.curvature.transparent_tensor import UncompiledTensor

__all__ = ["TwiceTensor", "explained"]

_COMPONENTS = (
    "Where the inputs are a mixture of Gaussians, give the components of the samples: "
    'noise=dd.NoiseModel.isotropic(inputs, components) with curvature="stein", which needs no '
    "derivative beyond the gradient."
)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    found = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(found) if inplace else found


def _hardsigmoid_(input: Tensor) -> Tensor:
    return _hardsigmoid(input, inplace=True)


_ELEMENTARY: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_,
}

_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
_RECURRENT = {torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu}


class TwiceTensor(UncompiledTensor):
    """A marked tensor whose operations have second derivatives, as far as torch knows any.

    ``torch.compile`` leaves it alone: compiled code drops the second derivatives of
    ``create_graph=True``, and does not always say so.
    """

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``, or what is equal to it up to rounding; what is detached is plain."""
        with _twice_differentiable(func):
            func = _ELEMENTARY.get(func, func)
            return super()._run(func, types, args, kwargs)


def _twice_differentiable(func: Callable[..., Any]) -> AbstractContextManager[Any]:
    # The fused kernels have a first derivative alone.
    if func in _ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    if func in _RECURRENT and torch.cuda.is_available():
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def explained(error: RuntimeError) -> RuntimeError | None:
    """What to say instead of torch's own words where a second derivative is missing.

    Args:
        error: torch's own.

    Returns:
        An error of the same meaning that names remedies; None where it is about something else.
    """
    said = str(error).split("\n")[0]
    if "checkpoint" in said:
        return RuntimeError(
            "DecoupledDescent: the curvature differentiates what follows the decoupled layer "
            f"twice, which reentrant activation checkpointing does not allow ({said}). Use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    if "once_differentiable" in said:
        return NotImplementedError(
            "DecoupledDescent: the curvature needs a second derivative, and a custom "
            "autograd.Function between the decoupled layer and the loss is marked "
            "@once_differentiable. Write its backward with differentiable operations on what "
            f"ctx.save_for_backward kept of inputs and outputs, without that mark. {_COMPONENTS}"
        )
    missing = re.search(r"derivative for (?:aten::)?(\w+)|[Dd]ouble.backwards? (?:is )?not", said)
    if missing is None and "double backward" not in said:
        return None
    name = "" if missing is None or missing[1] is None else missing[1]
    name = re.sub(r"_(for|back)ward$", "", name)
    where = f"{name or 'an operation'}, between the decoupled layer and the loss,"
    if "margin_loss" in name and "soft_margin" not in name:
        return NotImplementedError(
            f"DecoupledDescent: {where} has no second derivative in torch. The curvature of a "
            f"hinge lies in its kink, which no derivative sees however the loss is written. "
            f"{_COMPONENTS} Without them use a smoother loss: nn.CrossEntropyLoss, or the squared "
            "hinge written out, "
            "(1 - scores.gather(1, labels[:, None]) + scores).clamp_min(0).square().mean()."
        )
    if "aot_autograd" in said:
        return NotImplementedError(
            "DecoupledDescent: the curvature needs a second derivative, which compiled code "
            f"between the decoupled layer and the loss has not ({said}). Hand the compiled "
            "function what the model returns as it is: it then runs uncompiled in training "
            "forwards."
        )
    return NotImplementedError(
        f"DecoupledDescent: the curvature needs a second derivative, and {where} has none in torch "
        f"({said}). {_COMPONENTS} Writing the operation with elementary ones also works; for "
        "attention, torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )
