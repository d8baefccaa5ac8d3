"""Backward passes that are recorded up to the decoupled layer, and differentiated once more."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dd.curvature import user_hooks
from dd.curvature.twice import TwiceTensor
from dd.curvature.two_parts import (
    Asked,
    RecordedForward,
    Ways,
    accumulate,
    edge_of,
    gradients,
    passed_by,
    unmarked,
)

__all__ = ["RecordedForward", "RecordedTensor"]


class RecordedTensor(TwiceTensor):
    """A tensor that leads from R to the loss, and to the loss's backward pass.

    That pass is made in two parts. The first is recorded and ends at R, at the parameters in front
    of it and at other places there whose gradients are asked for; of the gradient at R the product
    with the Hessian follows. The second goes on from there as it would have gone.

    Every gradient is delivered once, and every hook on a tensor, a parameter or a module called
    once, with the gradients of an ordinary pass. What is not as in an ordinary pass:

    - Hooks on nodes in front of R (``grad_fn.register_hook``, ``register_prehook``) see recorded
      gradients, and are called once more where the product passes their node.
    - Tensors that were made of parameters alone and without R have their hooks called once, but
      with recorded gradients; so have modules that receive nothing else.
    - Parameters accumulate when the whole first part is done.
    - What the graph keeps beside the way from R to the loss is let go with the loss.
    """

    _pending: ClassVar["weakref.WeakSet[RecordedForward]"] = weakref.WeakSet()

    @classmethod
    def leading_from(cls, forward: RecordedForward, tensor: Tensor) -> "RecordedTensor":
        """Return R of a forward, shape (m, k), or what came of it as one that leads to its loss."""
        cls._pending.add(forward)
        return tensor.as_subclass(cls)

    @classmethod
    def forget(cls, forward: RecordedForward) -> None:
        """Look for a forward in no backward pass any more."""
        cls._pending.discard(forward)

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``; differentiate twice where it differentiates.

        Raises:
            NotImplementedError: if something between R and the loss has no second derivative.
        """
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func == _REQUIRES_GRAD:
            user_hooks.watch_module_hooks()
        found = super()._run(func, types, args, kwargs)
        return user_hooks.told_node(found) if func == _GRAD_FN else found


def _backward_of(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    _backward(loss, gradient, retain_graph, create_graph, inputs=inputs)


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    given = grad_variables if grad_tensors is None else grad_tensors
    asked = _asked(tensors, given, create_graph if retain_graph is None else retain_graph)
    ends = None if inputs is None else _ends(inputs)
    ways = Ways.of(asked.roots, RecordedTensor._pending)
    edges = None if ends is None else _edges(ends)
    for end in ends or ():
        if isinstance(end, Tensor) and end.requires_grad and not end.is_leaf:
            _retain_grad(end)
    split = ways.split(edges)
    # With a graph of the user's own the gradient that arrives at R can be differentiated.
    is_plain = create_graph or not all(map(_is_edge, edges or ()))
    if split.forwards and not is_plain:
        accumulate(asked, ways, split)
        return
    with passed_by(ways.beside(split), hears_scores=False):
        torch.autograd.backward(
            asked.roots,
            asked.gradients or None,
            asked.keeps,
            create_graph,
            inputs=edges,
        )


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **how: Any,
) -> tuple[Tensor | None, ...]:
    materializes = how.pop("materialize_grads", False)
    allows_unused = how.pop("allow_unused", None)
    is_batched = how.get("is_grads_batched", False)
    asked = _asked(outputs, grad_outputs, create_graph if retain_graph is None else retain_graph)
    ends = _ends(inputs)
    ways = Ways.of(asked.roots, RecordedTensor._pending)
    edges = _edges(ends)
    split = ways.split(edges)
    is_plain = create_graph or is_batched or not all(map(_is_edge, edges))
    if split.forwards and not is_plain:
        found: Sequence[Tensor | None] = gradients(asked, ways, split, edges)
    else:
        # Several gradients at once are none of a step's.
        beside = ways.forwards if is_batched else ways.beside(split)
        with passed_by(beside, hears_scores=False):
            found = torch.autograd.grad(
                asked.roots,
                edges,
                asked.gradients or None,
                asked.keeps,
                create_graph,
                allow_unused=True,
                **how,
            )
    missing = [index for index, gradient in enumerate(found) if gradient is None]
    if materializes:
        zeros = {index: _zeros(ends[index], requires_grad=create_graph) for index in missing}
        return tuple(zeros.get(index, gradient) for index, gradient in enumerate(found))
    if missing and not allows_unused:
        raise RuntimeError(
            f"The differentiated Tensor at index {missing[0]} appears to not have been used in the "
            "graph. Set allow_unused=True if this is the desired behavior."
        )
    return tuple(found)


def _zeros(end: Any, *, requires_grad: bool) -> Tensor:
    if isinstance(end, GradientEdge):
        raise RuntimeError(
            "materialize_grads cannot be used when the given input is a GradientEdge"
        )
    return torch.zeros_like(_plain(end), requires_grad=requires_grad)


def _asked(roots: Any, gradients: Any, keeps: bool) -> Asked:
    return Asked(_listed(roots), _listed(gradients), keeps)


def _listed(given: Any) -> list[Any]:
    """What backward passes take one or several of, in a list and without marks."""
    return [_plain(item) for item in _ends(given)]


def _ends(given: Any) -> list[Any]:
    """The same with marks; several may be the values of a dictionary."""
    if given is None:
        return []
    if isinstance(given, Tensor | GradientEdge):
        return [given]
    return list(given.values() if isinstance(given, dict) else given)


def _plain(item: Any) -> Any:
    return unmarked(item) if isinstance(item, RecordedTensor) else item


def _edges(ends: list[Any]) -> list[Any]:
    """Where they stand in the graph; what stands nowhere is torch's to complain of."""
    # An alias of a marked tensor would be another place.
    return [
        edge_of(end) if isinstance(end, Tensor) and end.requires_grad else _plain(end)
        for end in ends
    ]


def _is_edge(end: Any) -> bool:
    return isinstance(end, GradientEdge)


def _register_hook(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return user_hooks.register_hook(tensor, hook)


def _retain_grad(tensor: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.is_leaf:
            tensor.retain_grad()
        else:
            user_hooks.keep_gradient(tensor)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]

_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.backward: _backward_of,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: _retain_grad,
}
