"""Users' own autograd functions, whose second derivative may not be what it seems."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils._pytree import tree_leaves

from dd.curvature.transparent_tensor import TransparentTensor
from dd.support.user_warning import warn_user

__all__ = ["CurvatureWarning", "check_function"]


class CurvatureWarning(UserWarning):
    """The curvature may not be that of the loss.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.CurvatureWarning)  # end such a run at once
        >>> inputs = torch.cat([X[:, :1], X[:, :1].square() - 1], 1)  # no Gaussian
        >>> noise = dd.NoiseModel.fit(inputs, y)
        >>> model[0] = torch.nn.Linear(2, 4)
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, curvature="stein")
        >>> for step in range(5):
        ...     optimizer.zero_grad()
        ...     criterion(model(inputs), y).backward()
        ...     optimizer.step()
        Traceback (most recent call last):
            ...
        dd.curvature.custom.CurvatureWarning: DecoupledDescent: at training forward ...
    """


def check_function(node: object, told: set[type]) -> None:
    """Look whether a node can be differentiated once more.

    Args:
        node: of the autograd graph, any.
        told: functions that were warned of; is added to.

    Raises:
        RuntimeError: if its author has excluded that.

    Warns:
        CurvatureWarning: once a function, if it keeps what its second derivative takes for a
            constant.
    """
    if not isinstance(node, BackwardCFunction):
        return
    function: Any = getattr(node, "_forward_cls", type(node))
    # Torch raises this where a whole graph is differentiated, and skips it on the way to one input.
    if getattr(function.backward, "__code__", None) is _ONCE:
        raise RuntimeError(f"{function.__name__} was marked with @once_differentiable")
    if function in told or not _keeps_constants(node):
        return
    told.add(function)
    warn_user(
        f"DecoupledDescent: the autograd.Function {function.__name__}, between the decoupled layer "
        "and the loss, keeps values that its forward computed, beside its inputs and outputs. Its "
        "second derivative takes them for constants, so that the curvature, and with it the "
        "training error, may be wrong. Compute them again in backward, from what "
        "ctx.save_for_backward kept of inputs and outputs.",
        CurvatureWarning,
    )


_ONCE = once_differentiable(lambda *_: None).__code__


def _keeps_constants(node: BackwardCFunction) -> bool:
    # Marks outlast operations, and a forward computes without a graph.
    kept = [*node.saved_tensors, *tree_leaves(vars(node))]
    return any(
        isinstance(value, TransparentTensor)
        and not value.as_subclass(Tensor).requires_grad
        and torch.is_floating_point(value)
        for value in kept
    )
