"""One training forward, and what its backward delivers at the decoupled layer and the head."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dd.correction.gradient_terms import ProjectedTerm
from dd.correction.head_record import HeadRecord
from dd.curvature.estimators import BackwardResult, Curvature
from dd.curvature.recorded import RecordedTensor
from dd.curvature.twice import TwiceTensor, explained
from dd.curvature.user_hooks import quiet
from dd.functional import at_least_single
from dd.samples.placement import Placement
from dd.support.ranks import Ranks

__all__ = ["Capture", "StepGradients", "joined"]


CHANGED_IN_PLACE = (
    "DecoupledDescent: something after the decoupled layer changed its output in place, which it "
    "did not in the steps before; what the correction needs of it is lost, and nothing was "
    "updated. Clear the gradients and run this forward again: copies are kept from now on."
)


class Capture:
    """One training forward, and what its backward delivers.

    Args:
        placement: the samples of its batch.
        preactivation: R, shape (m, k).
        estimator: of the curvature.
        seed: of its probe.
        shares: whether what it keeps need not be copied, as nothing works on R in place.
        product: node that makes the weight's gradient, if known.
        directions: of the inputs, along which that is looked at, shape (j, d).

    Attributes:
        placement: the samples of its batch.
        gradient: ∂L/∂R, shape (m, k), or None before the backward pass.
        contribution: what the only backward pass added to the weight's gradient, where it was seen.
        tangent: derivative of the gradient along the probe, or None.
        is_intact: whether what the following layers received was not changed in place.
        inputs: of the layer, shape (m, d), where they may be asked for.
        signal: coordinates of the samples along the component means, shape (m, j), where the head
            is corrected.
        scores: what the head saw and said, where it is corrected.
    """

    inputs: Tensor | None = None
    signal: Tensor | None = None
    scores: HeadRecord | None = None

    def __init__(
        self,
        placement: Placement,
        preactivation: Tensor,
        estimator: Curvature,
        seed: int,
        *,
        shares: bool,
        product: Any = None,
        directions: Tensor | None = None,
    ) -> None:
        self.placement = placement
        self.gradient: Tensor | None = None
        self.contribution: ProjectedTerm | None = None
        self.tangent: Tensor | None = None
        self._expected: Tensor | None = None
        self._estimating = self._recording = False
        self._estimator = estimator
        # Layers that work in place change what they are handed, and its version tells.
        values = preactivation.detach()
        observed = estimator.observe(values, seed)
        handed = [observed, values] if estimator.sees_kinks else [observed]
        self._versions = [(tensor, tensor._version) for tensor in handed]
        self._shares = shares
        self._observed, *rest = handed if shares else [tensor.clone() for tensor in handed]
        self._preactivation = rest[0] if rest else None
        self._edge = get_gradient_edge(preactivation)
        preactivation.register_hook(_Listener(self.receive))
        self._directions = directions
        if product is not None:
            product.register_hook(_Listener(self.receive_product))

    def outgoing(self, tensor: Tensor) -> Tensor:
        """Return R as the following layers receive it, or anything that leads to the same loss.

        Args:
            tensor: R, shape (m, k), also where it was computed once more; or what came of it.
        """
        if self._estimator.records:
            return RecordedTensor.leading_from(self, tensor)
        if self._estimator.second_order:
            return tensor.as_subclass(TwiceTensor)
        return tensor

    @property
    def edge(self) -> GradientEdge:
        """Where R stands in the autograd graph."""
        return self._edge

    @property
    def probe(self) -> Tensor:
        """Direction in R along which the gradient is differentiated, shape (m, k)."""
        return self._observed

    @property
    def node(self) -> Any:
        """Node of R in the autograd graph."""
        return self._edge.node

    @property
    def is_intact(self) -> bool:  # noqa: D102 - in the class's attributes
        return all(tensor._version == version for tensor, version in self._versions)

    @property
    def observed(self) -> Tensor:
        """What the estimator keeps of the forward, shape (m, k).

        Raises:
            RuntimeError: if it was kept without a copy, and changed in place.
        """
        self._require_intact()
        return self._observed

    @property
    def preactivation(self) -> Tensor | None:
        """R, shape (m, k), where the estimator looks for kinks.

        Raises:
            RuntimeError: if it was kept without a copy, and changed in place.
        """
        self._require_intact()
        return self._preactivation

    def _require_intact(self) -> None:
        if self._shares and not self.is_intact:
            raise RuntimeError(CHANGED_IN_PLACE)

    @contextmanager
    def undisturbed(self) -> Iterator[tuple[Tensor, GradientEdge]]:
        """Let gradients pass by R uncounted; yields what was observed, and R's place."""
        self._estimating = True
        try:
            yield self.observed, self._edge
        finally:
            self._estimating = False

    @contextmanager
    def passed_by(self, *, hears_scores: bool) -> Iterator[None]:
        """Let gradients pass by R uncounted, and by the scores too where these are not heard."""
        before = self._estimating, self._recording
        self._estimating, self._recording = not hears_scores, True
        try:
            yield
        finally:
            self._estimating, self._recording = before

    def expect(self, product: Tensor | None) -> None:
        """Take the derivative along the probe of the gradient that comes next, shape (m, k)."""
        self._expected = product

    def receive(self, gradient: Tensor) -> None:
        """Keep a gradient that reached R."""
        if self._estimating or self._recording:
            return
        tangent, self._expected = self._expected, None
        if self.gradient is None:
            self.gradient, self.tangent = gradient, tangent
            return
        if self.tangent is not None and tangent is not None:
            self.tangent = self.tangent + tangent
        elif self.tangent is not None or tangent is not None:
            # Of one part alone the derivative would be too small.
            self.gradient, self.tangent = self.gradient.detach(), None
            gradient = gradient.detach()
        self.gradient = self.gradient + gradient
        # It may have gone no further than to R, and then adds nothing to the weight's.
        self.contribution = None

    def receive_product(
        self, results: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Look at what a gradient that reached R adds to that of the weight.

        Args:
            results: of the node; the last one is the weight's gradient, shape (d, k).
            gradients: what the node received.
        """
        if self._estimating or self._recording or self._directions is None:
            return
        term, self.contribution = results[-1], None
        # A hook of the user's may have put another gradient in place of the one that was kept.
        if term is not None and self.gradient is not None and gradients[0] is self.gradient:
            self.contribution = ProjectedTerm.of(term.mT, self._directions)

    def follow(self, scores: Tensor, corrected: Tensor, features: Tensor) -> None:
        """Take down what the head saw and said.

        Args:
            scores: the head's plain output, shape (m, C).
            corrected: what the loss receives, shape (m, C).
            features: inputs of the head, and 1 for its bias, shape (m, f).

        Raises:
            RuntimeError: if the scores do not depend on the pre-activations.
        """
        # What follows may change the scores in place.
        values = corrected.detach().clone()
        self.scores = HeadRecord(values, features, self._jacobian(scores))
        corrected.register_hook(_Listener(self.receive_scores))

    def _jacobian(self, scores: Tensor) -> Tensor:
        directions = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
        with self.undisturbed(), quiet():
            try:
                rows = [
                    torch.autograd.grad(
                        scores,
                        self._edge,
                        direction.expand(scores.shape),
                        retain_graph=True,
                        allow_unused=True,
                    )[0]
                    for direction in directions
                ]
            except RuntimeError as error:
                raise RuntimeError(
                    "DecoupledDescent: head=True differentiates every score in the forward pass, "
                    f"and something between the decoupled layer and the head does not allow it "
                    f"({error}). Use head=False, or no activation checkpointing there."
                ) from error
        if any(row is None for row in rows):
            raise RuntimeError(
                "DecoupledDescent: the head's output does not depend on the decoupled layer's; "
                "name the layer that computes the scores with head="
            )
        return torch.stack(rows, 1).detach()

    def receive_scores(self, gradient: Tensor) -> None:
        """Keep a gradient that reached the scores."""
        if self._estimating or self.scores is None:
            return
        gradient = gradient.detach()
        earlier = self.scores.gradient
        self.scores.gradient = gradient if earlier is None else earlier + gradient

    def product(self) -> Tensor:
        """What the curvature needs of the backward pass, once the gradient is there.

        Raises:
            NotImplementedError: if an operation has no second derivative.
            RuntimeError: if the curvature cannot be had for another reason.
        """
        assert self.gradient is not None
        # Differentiating the gradient again passes by R and must not count as a gradient.
        with self.undisturbed() as (observed, edge):
            backward = BackwardResult(self.gradient, self.tangent, edge)
            try:
                return self._estimator.product(observed, backward)
            except RuntimeError as error:
                told = explained(error)
                if told is None:
                    raise
                raise told from error

    def close(self) -> None:
        """Wait for no gradient any more."""
        RecordedTensor.forget(self)


@dataclass(frozen=True, eq=False)
class StepGradients:
    """The rows of all forwards that lead to one step.

    Attributes:
        placement: the samples of the rows.
        gradient: G, shape (m, k).
        observed: what the estimator kept of the forwards, shape (m, k).
        preactivation: R, shape (m, k), where the estimator looks for kinks, else None.
        captures: the forwards.
        signal: coordinates along the component means, shape (m, j), or None.
        scores: what the head saw and said, or None.
    """

    placement: Placement
    gradient: Tensor
    observed: Tensor
    preactivation: Tensor | None
    captures: Sequence[Capture]
    signal: Tensor | None
    scores: HeadRecord | None

    def product(self) -> Tensor:
        """What the curvature needs of the backward passes."""
        return _stacked([capture.product() for capture in self.captures])

    def gathered(self, ranks: Ranks, num_samples: int) -> "StepGradients":
        """The rows of all ranks, which number n samples alike."""
        placement, scores = self.placement, self.scores
        index = placement.index
        if index is None:
            index = torch.arange(num_samples, device=self.gradient.device)
        index = ranks.gather(index.unsqueeze(1)).squeeze(1)
        found = ranks.gather(placement.fingerprints)
        if scores is not None and scores.gradient is not None:
            # What the curvature needs stays here; its parts are summed over ranks.
            scores = replace(
                scores,
                features=ranks.gather(scores.features),
                gradient=ranks.gather(scores.gradient),
            )
        return replace(
            self,
            placement=Placement.of(found, index, num_samples),
            gradient=ranks.gather(self.gradient),
            signal=None if self.signal is None else ranks.gather(self.signal),
            scores=scores,
        )

    @property
    def by_sample(self) -> Tensor:
        """G with one row a distinct sample, shape (u, k), in single precision at least."""
        # Sums over copies of a sample may be too large for half precision.
        return self.placement.by_sample(at_least_single(self.gradient))


def joined(captures: Sequence[Capture], num_samples: int) -> StepGradients:
    """Put the rows of micro-batches together.

    Args:
        captures: forwards that have their gradients.
        num_samples: n.
    """
    gradients = [c.gradient.detach() for c in captures if c.gradient is not None]
    signals = [c.signal for c in captures if c.signal is not None]
    scores = [c.scores for c in captures if c.scores is not None]
    found = [c.preactivation for c in captures]
    preactivations = [rows for rows in found if rows is not None]
    return StepGradients(
        placement=Placement.joined([c.placement for c in captures], num_samples),
        gradient=_stacked(gradients),
        observed=_stacked([c.observed for c in captures]),
        preactivation=_stacked(preactivations) if preactivations else None,
        captures=captures,
        signal=_stacked(signals) if signals else None,
        scores=HeadRecord.joined(scores) if len(scores) == len(captures) else None,
    )


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Listener:
    """Lets a method see the gradients at a tensor or a node, as long as its owner lives."""

    def __init__(self, receive: Callable[..., Tensor | None]) -> None:
        # The graph must not own the capture, which owns an edge of the graph.
        self._receive = weakref.WeakMethod(receive)

    # A backward pass called from a compiled function must not compile this.
    @_disable_dynamo
    def __call__(self, *gradients: Any) -> Tensor | None:
        receive = self._receive()
        return None if receive is None else receive(*gradients)
