"""Backward passes that are recorded up to the decoupled layer, and differentiated once more."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from dd.curvature.custom import check_function
from dd.curvature.twice import TwiceTensor, explained
from dd.curvature.user_hooks import (
    WatchedHook,
    keep_gradient,
    quiet,
    silenced,
    watch_module_hooks,
)

__all__ = ["RecordedForward", "RecordedTensor"]


class RecordedForward(Protocol):
    """A training forward whose gradient at R is to be differentiated along its probe."""

    @property
    def node(self) -> Any:
        """Node of R in the autograd graph."""

    @property
    def edge(self) -> GradientEdge:
        """Where R stands in the autograd graph."""

    @property
    def probe(self) -> Tensor:
        """Direction in R, shape (m, k)."""

    def passed_by(self, *, hears_scores: bool) -> AbstractContextManager[Any]:
        """Let gradients pass by R uncounted, and by the scores too where these are not heard."""

    def expect(self, product: Tensor | None) -> None:
        """Take the derivative along the probe of the gradient that comes next, shape (m, k)."""


class RecordedTensor(TwiceTensor):
    """A tensor that leads from R to the loss, and to the loss's backward pass.

    That pass is made in two parts. The first is recorded and ends at R and at the parameters behind
    it; of the gradient at R the product with the Hessian follows. The second goes on from there as
    it would have gone. Every node and every hook is passed once.
    """

    _pending: ClassVar["weakref.WeakSet[RecordedForward]"] = weakref.WeakSet()
    _told: ClassVar[set[type]] = set()

    @classmethod
    def leading_from(cls, forward: RecordedForward, preactivation: Tensor) -> "RecordedTensor":
        """Return R of a forward, shape (m, k), as a tensor that leads to its loss."""
        cls._pending.add(forward)
        return preactivation.as_subclass(cls)

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
            watch_module_hooks()
        return super()._run(func, types, args, kwargs)


class Ways(NamedTuple):
    """What a backward pass will reach.

    Attributes:
        forwards: pending ones.
        leaves: parameters that it reaches without passing by any of these.
        nodes: all that it passes on the way.
    """

    forwards: list[RecordedForward]
    leaves: list[Tensor]
    nodes: set[Any]


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
    roots = _listed(tensors)
    given = _listed(grad_variables if grad_tensors is None else grad_tensors)
    ends = None if inputs is None else _listed(tree_map_only(RecordedTensor, _edge, inputs))
    keeps = create_graph if retain_graph is None else retain_graph
    ways = _ways(roots)
    if create_graph or not ways.forwards:
        # With a graph of the user's own the gradient that arrives at R can be differentiated.
        _plain_backward(roots, given, keeps, create_graph, ends)
        return
    if ends is not None:
        if not all(isinstance(end, Tensor) and end.is_leaf for end in ends):
            _expect_products(roots, given, ways, keeps=True)
            _plain_backward(roots, given, keeps, create_graph, ends)
            return
        wanted = {id(end) for end in ends}
        ways = ways._replace(leaves=[leaf for leaf in ways.leaves if id(leaf) in wanted])
    gradients = _expect_products(roots, given, ways, keeps=keeps)
    places = [*(forward.edge for forward in ways.forwards), *ways.leaves]
    reached = [(p, g.detach()) for p, g in zip(places, gradients, strict=True) if g is not None]
    if reached:
        starts, arrived = zip(*reached, strict=True)
        _plain_backward(starts, arrived, keeps, False, ends)


def _plain_backward(
    roots: Sequence[Any],
    gradients: Sequence[Any],
    keeps: bool,
    create_graph: bool,
    inputs: Sequence[Any] | None,
) -> None:
    torch.autograd.backward(roots, gradients or None, keeps, create_graph, inputs=inputs)


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **how: Any,
) -> Any:
    roots, given = _listed(outputs), _listed(grad_outputs)
    # An alias of an input would be another place in the graph.
    ends = tree_map_only(RecordedTensor, _edge, inputs)
    if not create_graph and not how.get("is_grads_batched", False):
        ways = _ways(roots)
        if ways.forwards:
            _expect_products(roots, given, ways._replace(leaves=[]), keeps=True)
    try:
        return torch.autograd.grad(roots, ends, given or None, retain_graph, create_graph, **how)
    finally:
        for forward in RecordedTensor._pending:
            forward.expect(None)


def _expect_products(
    roots: Sequence[Any], given: Sequence[Any], ways: Ways, *, keeps: bool
) -> Sequence[Tensor | None]:
    """Differentiate up to R and the parameters behind it, and the gradient at R once more.

    Returns:
        The gradients at R of each forward and of each parameter; None where there is no way.

    Raises:
        NotImplementedError: if something on the way has no second derivative.
        RuntimeError: whatever else torch raises.
    """
    edges = [forward.edge for forward in ways.forwards]
    try:
        for node in ways.nodes:
            check_function(node, RecordedTensor._told)
        with _passed_by(ways.forwards, hears_scores=True), silenced(ways.leaves):
            places: list[Any] = [*edges, *ways.leaves]
            found = torch.autograd.grad(roots, places, given or None, True, True, allow_unused=True)
        # A function's backward may bring in marks that its forward has kept.
        gradients = [_plain(gradient) for gradient in found]
        arrived = list(zip(ways.forwards, gradients, strict=False))
        # A gradient without a graph depends on R no more: the loss is linear in it.
        curved = [(f, g) for f, g in arrived if g is not None and g.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(edges)
        if curved:
            probes = [forward.probe for forward, _ in curved]
            with _passed_by(ways.forwards, hears_scores=False), quiet():
                products = torch.autograd.grad(
                    [g for _, g in curved], edges, probes, keeps, allow_unused=True
                )
    except RuntimeError as error:
        told = explained(error)
        if told is None:
            raise
        raise told from error
    for (forward, gradient), product in zip(arrived, products, strict=True):
        if gradient is not None:
            forward.expect(torch.zeros_like(gradient) if product is None else product.detach())
    return gradients


@contextmanager
def _passed_by(forwards: Sequence[RecordedForward], *, hears_scores: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for forward in forwards:
            stack.enter_context(forward.passed_by(hears_scores=hears_scores))
        yield


def _ways(roots: Sequence[Any]) -> Ways:
    pending = {forward.node: forward for forward in RecordedTensor._pending}
    forwards: list[RecordedForward] = []
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    waiting = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in pending:
            forwards.append(pending[node])
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        waiting.extend(parent for parent, _ in node.next_functions)
    return Ways(forwards, leaves, seen)


def _listed(given: Any) -> list[Any]:
    """What backward passes take one or several of, in a list and without marks."""
    if given is None:
        return []
    if isinstance(given, Tensor | GradientEdge):
        given = (given,)
    return [_plain(item) for item in given]


def _plain(item: Any) -> Any:
    if not isinstance(item, RecordedTensor):
        return item
    # Users may differentiate where nothing is recorded.
    with torch.enable_grad():
        return item.as_subclass(Tensor)


def _edge(tensor: Tensor) -> GradientEdge:
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor)


def _register_hook(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.register_hook(WatchedHook(hook))


def _retain_grad(tensor: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.is_leaf:
            tensor.retain_grad()
        else:
            keep_gradient(tensor)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.backward: _backward_of,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: _retain_grad,
}
