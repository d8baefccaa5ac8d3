"""Backward passes in two parts: recorded up to the decoupled layer, and from there as ever."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dd.curvature.custom import check_function
from dd.curvature.twice import explained
from dd.curvature.user_hooks import quiet, recording, silenced

__all__ = [
    "Asked",
    "RecordedForward",
    "Split",
    "Ways",
    "accumulate",
    "edge_of",
    "gradients",
    "passed_by",
    "unmarked",
]


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


class Asked(NamedTuple):
    """What a backward pass begins with.

    Attributes:
        roots: tensors or edges that are differentiated.
        gradients: of each, or none for those of scalars.
        keeps: whether the graph is kept.
    """

    roots: Sequence[Any]
    gradients: Sequence[Any]
    keeps: bool


class Ways(NamedTuple):
    """What a backward pass can reach.

    Attributes:
        forwards: pending ones.
        leaves: parameters that it reaches without passing by any of these.
        nodes: all that it passes on the way, those of the forwards included.
        functions: those among these that are users' own.
    """

    forwards: list[RecordedForward]
    leaves: list[GradientEdge]
    nodes: set[Any]
    functions: list[Any]

    @classmethod
    def of(cls, roots: Iterable[Any], pending: Iterable[RecordedForward]) -> "Ways":
        """Follow a graph up to the pending forwards; nowhere, where there are none."""
        ends = {forward.node: forward for forward in pending}
        found = cls([], [], set(), [])
        # A root that requires no gradient is torch's to complain of.
        starts = [r for r in roots if isinstance(r, GradientEdge) or r.requires_grad]
        waiting: list[Any] = [edge_of(root).node for root in starts] if ends else []
        while waiting:
            node = waiting.pop()
            if node is None or node in found.nodes:
                continue
            found.nodes.add(node)
            if node in ends:
                found.forwards.append(ends[node])
                continue
            if _is_leaf(node):
                found.leaves.append(GradientEdge(node, 0))
            if isinstance(node, BackwardCFunction):
                found.functions.append(node)
            waiting.extend(parent for parent, _ in node.next_functions)
        return found

    def beside(self, split: "Split") -> list[RecordedForward]:
        """Forwards at whose R no gradient is asked for, nor behind it."""
        return [forward for forward in self.forwards if forward not in split.forwards]

    def split(self, ends: Sequence[Any] | None) -> "Split":
        """Tell what comes before R from what comes behind it.

        Args:
            ends: edges where gradients are asked for, and whatever else; None for every parameter.
        """
        if ends is None:
            return Split(self.forwards, self.leaves, [], None)
        behind = {forward: _nodes_behind(forward.node) for forward in self.forwards}
        ends = [end for end in ends if isinstance(end, GradientEdge)]
        wanted = {end.node for end in ends}
        forwards = [f for f in self.forwards if not wanted.isdisjoint(behind[f])]
        early = [end for end in _distinct(ends) if end.node in self.nodes]
        leaves = [end for end in early if _is_leaf(end.node)]
        apart = {*(leaf.node for leaf in leaves), *(forward.node for forward in self.forwards)}
        between = [end for end in early if end.node not in apart]
        reached = {leaf.node for leaf in leaves}.union(*(behind[f] for f in forwards))
        return Split(forwards, leaves, between, [e for e in _distinct(ends) if e.node in reached])


class Split(NamedTuple):
    """The two parts of a backward pass.

    Attributes:
        forwards: pending ones that it passes by.
        leaves: parameters that the first part reaches.
        between: other places in front of R whose gradients are asked for.
        late: where the second part ends; None for every parameter.
    """

    forwards: Sequence[RecordedForward]
    leaves: Sequence[GradientEdge]
    between: Sequence[GradientEdge]
    late: Sequence[GradientEdge] | None


class Arrived(NamedTuple):
    """What the first part of a backward pass has delivered.

    Attributes:
        starts: where the second part begins.
        gradients: there.
        between: gradients at the places of :attr:`Split.between`, or None.
    """

    starts: Sequence[GradientEdge]
    gradients: Sequence[Tensor]
    between: Sequence[Tensor | None]


def accumulate(asked: Asked, ways: Ways, split: Split) -> None:
    """Do what ``torch.autograd.backward`` does, and tell the forwards their products.

    Raises:
        NotImplementedError: if something between R and the loss has no second derivative.
        RuntimeError: whatever else torch raises.
    """
    with _begun(asked, ways, split) as arrived:
        if arrived.starts:
            torch.autograd.backward(
                arrived.starts, arrived.gradients, asked.keeps, False, inputs=split.late
            )


def gradients(
    asked: Asked, ways: Ways, split: Split, ends: Sequence[GradientEdge]
) -> list[Tensor | None]:
    """Do what ``torch.autograd.grad`` does, and tell the forwards their products.

    Returns:
        The gradients at the ends; None where there is no way.

    Raises:
        NotImplementedError: if something between R and the loss has no second derivative.
        RuntimeError: whatever else torch raises.
    """
    late: Sequence[Tensor | None] = []
    with _begun(asked, ways, split) as arrived:
        if arrived.starts and split.late:
            late = torch.autograd.grad(
                arrived.starts, split.late, arrived.gradients, asked.keeps, allow_unused=True
            )
    places = [*split.between, *(split.late or ())]
    found: dict[tuple[Any, int], Tensor] = {}
    for place, gradient in zip(places, [*arrived.between, *late], strict=False):
        if gradient is not None:
            # A place may be reached past R as well as from there.
            earlier = found.get(_key(place))
            found[_key(place)] = gradient if earlier is None else earlier + gradient
    return [found.get(_key(end)) for end in ends]


@contextmanager
def _begun(asked: Asked, ways: Ways, split: Split) -> Iterator[Arrived]:
    """Make the first part; the second is to be made within."""
    with passed_by(ways.beside(split), hears_scores=False):
        arrived = _first_part(asked, ways, split)
        try:
            yield arrived
        except BaseException:
            for forward in split.forwards:
                forward.expect(None)
            raise


def _first_part(asked: Asked, ways: Ways, split: Split) -> Arrived:
    """Differentiate up to R and the parameters in front of it, and the gradient at R once more.

    Raises:
        RuntimeError: whatever torch raises, explained where it can be.
    """
    forwards, leaves = split.forwards, split.leaves
    edges = [forward.edge for forward in forwards]
    places = [*edges, *leaves, *split.between]
    try:
        for function in ways.functions:
            check_function(function, _TOLD)
        with (
            passed_by(forwards, hears_scores=True),
            _ending_at(forwards),
            silenced(map(_parameter, leaves)),
            recording(),
        ):
            found = torch.autograd.grad(
                asked.roots, places, asked.gradients or None, True, True, allow_unused=True
            )
        # A function's backward may bring in marks that its forward has kept.
        arrived = [None if item is None else unmarked(item) for item in found]
        at_layer = arrived[: len(edges)]
        products = _products(forwards, at_layer, asked.keeps)
    except RuntimeError as error:
        told = explained(error)
        if told is None:
            raise
        raise told from error
    for forward, product in zip(forwards, products, strict=True):
        forward.expect(product)
    plain = [None if item is None else item.detach() for item in arrived]
    count = len(edges) + len(leaves)
    starts = [(p, g) for p, g in zip(places[:count], plain[:count], strict=True) if g is not None]
    return Arrived([p for p, _ in starts], [g for _, g in starts], plain[count:])


def _products(
    forwards: Sequence[RecordedForward], gradients: Sequence[Tensor | None], keeps: bool
) -> list[Tensor | None]:
    """Derivatives of the gradients at R along the probes; None where there is no gradient."""
    # A gradient without a graph depends on R no more: the loss is linear in it.
    curved = [
        (forward, gradient)
        for forward, gradient in zip(forwards, gradients, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    found: Sequence[Tensor | None] = [None] * len(forwards)
    if curved:
        probes = [forward.probe for forward, _ in curved]
        edges = [forward.edge for forward in forwards]
        with passed_by(forwards, hears_scores=False), quiet():
            found = torch.autograd.grad(
                [g for _, g in curved], edges, probes, keeps, allow_unused=True
            )
    return [
        gradient if gradient is None else _or_zero(product, gradient)
        for gradient, product in zip(gradients, found, strict=True)
    ]


def _or_zero(product: Tensor | None, gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient.detach()) if product is None else product.detach()


@contextmanager
def passed_by(forwards: Iterable[RecordedForward], *, hears_scores: bool) -> Iterator[None]:
    """Let gradients pass by several forwards, as :meth:`RecordedForward.passed_by` does."""
    with ExitStack() as stack:
        for forward in forwards:
            stack.enter_context(forward.passed_by(hears_scores=hears_scores))
        yield


@contextmanager
def _ending_at(forwards: Sequence[RecordedForward]) -> Iterator[None]:
    """Let no gradient pass R for a while."""
    # Torch goes there for what comes both in front of R and behind it.
    handles = [forward.node.register_prehook(_zeros) for forward in forwards]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)


def edge_of(place: Tensor | GradientEdge) -> GradientEdge:
    """Where a tensor that requires a gradient stands in the autograd graph."""
    if isinstance(place, GradientEdge):
        return place
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(place)


def unmarked(tensor: Tensor) -> Tensor:
    """The same tensor without a mark."""
    # Users may differentiate where nothing is recorded.
    with torch.enable_grad():
        return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


_TOLD: set[type] = set()


def _key(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr


def _distinct(edges: Iterable[GradientEdge]) -> list[GradientEdge]:
    return list({_key(edge): edge for edge in edges}.values())


def _is_leaf(node: Any) -> bool:
    return isinstance(getattr(node, "variable", None), Tensor)


def _parameter(leaf: GradientEdge) -> Tensor:
    found: Any = leaf.node
    return found.variable


def _nodes_behind(node: Any) -> set[Any]:
    """A node and all that its gradient goes to."""
    found: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return found
