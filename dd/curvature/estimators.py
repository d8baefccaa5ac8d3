"""Three estimators of the curvature H = Σ_i ∂²L/∂r_i² behind one interface.

Under a noise mass for every sample H is Σ_i r_i ∂²L/∂r_i², r_i the sample's mass over the mean.

An estimator sees the corrected pre-activation in the forward pass (:meth:`Curvature.observe`) and
what the backward pass delivered (:meth:`Curvature.product`). Of one or more such pairs it forms
moments, which can be pooled over micro-batches, processes and steps, and from these it solves H.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dd.curvature.moments import Moments
from dd.functional import (
    at_least_single,
    centre_within_components,
    kink_signs,
    kink_terms,
    rademacher,
    scaled_by_mass,
    solved_curvature,
    symmetric_curvature,
)
from dd.noise.units import Units
from dd.support.ranks import Ranks

__all__ = ["BackwardResult", "Curvature", "Exact", "GraphProbe", "Probe", "Rows", "Stein"]


@dataclass(frozen=True)
class BackwardResult:
    """What one backward pass delivers at the corrected pre-activation R.

    Attributes:
        gradient: G = ∂L/∂R, shape (m, k); part of a graph only under ``create_graph=True``.
        tangent: derivative of G along the observed probe, shape (m, k), or None.
        edge: where R stands in the autograd graph.
    """

    gradient: Tensor
    tangent: Tensor | None
    edge: GradientEdge


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a step, of which an estimator forms its moments.

    Attributes:
        observed: what :meth:`Curvature.observe` returned, shape (m, k).
        product: what :meth:`Curvature.product` returned.
        index: sample of each row, shape (m,); None for all samples in their order.
        ranks: over which rows are spread.
        preactivation: R, shape (m, k), for estimators that look for kinks; else None.
        gradient: G, shape (m, k), likewise.
        units: rows that share noise, or None where each is a sample by itself.
        pools: whether their moments may be pooled with those of other steps.
    """

    observed: Tensor
    product: Tensor
    index: Tensor | None
    ranks: Ranks
    preactivation: Tensor | None = None
    gradient: Tensor | None = None
    units: Units | None = None
    pools: bool = True


class Curvature(ABC):
    """One estimator of H.

    Attributes:
        records: whether backward passes are differentiated along the observed probe.
        second_order: whether the gradient must be part of a graph.
        sees_kinks: whether it needs R beside what it observes, to find what kinks add.
        pooled_rows: how many rows a unit the moments of small batches are pooled to, over steps.
        num_components: means that the moments are centred by.
    """

    records: ClassVar[bool] = False
    second_order: ClassVar[bool] = False
    sees_kinks: ClassVar[bool] = False
    pooled_rows: ClassVar[int] = 0
    num_components: int = 0

    @abstractmethod
    def observe(self, preactivation: Tensor, seed: int) -> Tensor:
        """Return what is kept of R (m, k) until the step; it may be R itself."""

    @abstractmethod
    def product(self, observed: Tensor, backward: BackwardResult) -> Tensor:
        """Return what the moments need of one backward pass, shape (m, k) or (m, k, k)."""

    @abstractmethod
    def moments(self, rows: Rows) -> Moments:
        """Moments of the rows of a step."""

    @abstractmethod
    def solve(self, moments: Moments) -> Tensor:
        """Return H, shape (k, k), symmetric."""

    def pooled(self, moments: Moments, earlier: Moments, keep: float) -> Moments:
        """Moments of a step and, with a weight of ``keep``, of the steps before."""
        raise NotImplementedError

    def solve_pooled(self, moments: Moments) -> Tensor:
        """Return H of moments that may hold fewer rows than units so far."""
        return self.solve(moments)

    def estimate(
        self, observed: Tensor, backward: BackwardResult, preactivation: Tensor | None = None
    ) -> Tensor:
        """Return H, shape (k, k), of one pass over all samples in their order."""
        rows = Rows(
            observed,
            self.product(observed, backward),
            None,
            Ranks(),
            preactivation,
            backward.gradient.detach(),
            pools=False,
        )
        return self.solve(self.moments(rows))


class Stein(Curvature):
    """Stein's lemma on R centred within mixture components.

    It holds where R is Gaussian within each, which audits watch (:mod:`dd.watch.audit`). Its
    solution waits for an accelerator, whose eigenvalues are found by iteration.

    Args:
        components: component of each sample, shape (n,), integers from 0.
        ridge: regularisation relative to the mean eigenvalue of the covariance of R.
        may_fall_back: whether a probe takes its place where its lemma is found to fail.
    """

    pooled_rows = 64

    def __init__(
        self, components: Tensor, ridge: float = 1e-4, *, may_fall_back: bool = False
    ) -> None:
        self.components, self.may_fall_back = components, may_fall_back
        self.num_components = int(components.max()) + 1
        self.ridge = ridge

    def observe(self, preactivation: Tensor, seed: int) -> Tensor:
        """Return R."""
        return at_least_single(preactivation)

    def product(self, observed: Tensor, backward: BackwardResult) -> Tensor:
        """Return G."""
        return backward.gradient.detach()

    def moments(self, rows: Rows) -> Moments:
        """R_cᵀR_c / m and R_cᵀG."""
        components, count = self.of(rows.index, rows.observed.device), self.num_components
        both = rows.observed, rows.product
        if rows.units is not None:
            there = rows.units.has_noise
            there = there if rows.index is None else there[rows.index]
            # Rows of padding are no draws of R.
            both, components = (both[0][there], both[1][there]), components[there]
        return Moments.centred(*both, components, count, rows.ranks, pools=rows.pools)

    def solve(self, moments: Moments) -> Tensor:
        """Solve K H = R_cᵀ G for the symmetric H."""
        return symmetric_curvature(moments.gram, moments.cross, self.ridge)

    def pooled(self, moments: Moments, earlier: Moments, keep: float) -> Moments:
        """Pool K and the means, which the noise of a batch would bias; R_cᵀG is the step's own."""
        return moments.merged(earlier, keep)

    def of(self, index: Tensor | None, device: torch.device) -> Tensor:
        """Components of some samples, shape (m,)."""
        self.components = self.components.to(device)
        return self.components if index is None else self.components[index]

    def centred(self, observed: Tensor, index: Tensor | None) -> Tensor:
        """R around its component means, shape (m, k)."""
        components = self.of(index, observed.device)
        return centre_within_components(observed, components, self.num_components)


class _SecondDerivative(Curvature):
    """An estimator that differentiates the gradient: Σ_i r_i ∂²L/∂r_i² under masses r.

    At the kink of a piecewise linear activation the gradient jumps, which no derivative sees; what
    that adds is estimated from the samples next to it.

    Args:
        relative_mass: r, noise mass of each sample over its mean, shape (n,); equal by default.
        leaky: whether kinks at 0 may be other than a ReLU's.
    """

    sees_kinks = True

    def __init__(self, relative_mass: Tensor | None = None, *, leaky: bool = False) -> None:
        self.relative_mass, self.leaky = relative_mass, leaky

    def weighted(self, product: Tensor, rows: Rows) -> Tensor:
        """Scale row i of a curvature-vector product (m, k) by its sample's relative mass.

        Where rows share noise, H holds ρ_ab ∂²ℓ/∂r_a∂r_b of two rows of a unit as well.
        """
        if rows.units is not None:
            return rows.units.weighted(product, rows.index)
        return scaled_by_mass(product, self._mass_of(rows.index, product.device))

    def kinks(self, rows: Rows) -> Tensor | None:
        """What kinks add to the diagonal, shape (k,), over all ranks; None where R is not given."""
        if rows.preactivation is None or rows.gradient is None:
            return None
        mass = self._mass_of(rows.index, rows.gradient.device)
        if rows.units is not None:
            mass = rows.units.mass if rows.index is None else rows.units.mass[rows.index]
        both = rows.preactivation, rows.gradient
        signs = rows.ranks.sum(kink_signs(*both))
        found = kink_terms(*both, signs, mass, leaky=self.leaky).sum(-2)
        return rows.ranks.sum(found)

    def _mass_of(self, index: Tensor | None, device: torch.device) -> Tensor | None:
        mass = self.relative_mass
        return mass if mass is None or index is None else mass.to(device)[index]


class Probe(_SecondDerivative):
    """One Rademacher curvature-vector product, of a backward pass that the library records."""

    records = True
    # More would lag behind, fewer leave the noise of the probe: each biases the shadows.
    pooled_rows = 16
    _unit: int | None = None

    @contextmanager
    def along(self, unit: int) -> Iterator[None]:
        """Draw probes along one unit for a while, whose products are a column of H."""
        self._unit = unit
        try:
            yield
        finally:
            self._unit = None

    def observe(self, preactivation: Tensor, seed: int) -> Tensor:
        """Draw the probe."""
        generator = torch.Generator(preactivation.device).manual_seed(seed)
        if self._unit is None:
            return rademacher(preactivation, generator)
        # Signs of their own keep apart samples that depend on each other, as in a batch norm.
        found = torch.zeros_like(preactivation)
        found[:, self._unit] = rademacher(preactivation[:, 0], generator)
        return found

    def column(self, rows: Rows) -> Tensor:
        """The column of H that a pass :meth:`along` a unit gives, shape (k,), kinks left out."""
        product = at_least_single(self.weighted(rows.product, rows))
        signs = at_least_single(rows.observed).sum(1, keepdim=True)
        return (signs * product).sum(0)

    def product(self, observed: Tensor, backward: BackwardResult) -> Tensor:
        """Return the derivative of the gradient, or take it where users have recorded it.

        Raises:
            RuntimeError: if the backward pass was not met.
        """
        if backward.tangent is not None:
            return backward.tangent
        if backward.gradient.requires_grad:
            return _differentiate(backward, observed, keep_graph=False)
        raise RuntimeError(UNMET)

    def moments(self, rows: Rows) -> Moments:
        """VᵀV / m and Vᵀ(HV), and what kinks add to it."""
        product = self.weighted(rows.product, rows)
        found, kinks = Moments.plain(rows.observed, product, rows.ranks), self.kinks(rows)
        if kinks is None:
            return found
        return replace(found, cross=found.cross + found.gram * kinks.to(found.gram))

    def solve(self, moments: Moments) -> Tensor:
        """Average the products over samples."""
        return solved_curvature(moments.gram, moments.cross)

    def pooled(self, moments: Moments, earlier: Moments, keep: float) -> Moments:
        """Average the products over steps, too."""
        return moments.averaged(earlier, keep)

    def solve_pooled(self, moments: Moments) -> Tensor:
        """The same; of few rows by the expectation of VᵀV / m, the identity."""
        enough = moments.rows >= 2 * len(moments.gram)
        return torch.where(enough, self.solve(moments), (moments.cross + moments.cross.mT) / 2)


class GraphProbe(Probe):
    """The same product through ``loss.backward(create_graph=True)``."""

    records = False
    second_order = True

    def product(self, observed: Tensor, backward: BackwardResult) -> Tensor:
        """Differentiate the gradient once more along the probe.

        Raises:
            RuntimeError: if the gradient is not part of a graph.
        """
        return _differentiate(backward, observed, keep_graph=False)


class Exact(_SecondDerivative):
    """All k curvature-vector products, through ``loss.backward(create_graph=True)``."""

    second_order = True

    def observe(self, preactivation: Tensor, seed: int) -> Tensor:
        """Keep nothing but the shape."""
        return torch.empty_like(preactivation, device="meta")

    def product(self, observed: Tensor, backward: BackwardResult) -> Tensor:
        """Differentiate every column of the gradient; shape (m, k, k).

        Raises:
            RuntimeError: if the gradient is not part of a graph.
        """
        columns = torch.eye(observed.shape[-1], device=backward.gradient.device)
        columns = columns.to(backward.gradient.dtype)
        rows = [
            _differentiate(backward, column.expand_as(observed), keep_graph=True)
            for column in columns
        ]
        return torch.stack(rows, 1)

    def moments(self, rows: Rows) -> Moments:
        """The sum itself, beside a gram matrix of ones."""
        product, ranks = rows.product, rows.ranks
        parts = self.weighted(product.flatten(1), rows)
        total, kinks = ranks.sum(parts.sum(0).view(product.shape[1:])), self.kinks(rows)
        if kinks is not None:
            total = total + torch.diag(kinks).to(total)
        count = ranks.sum(total.new_tensor(float(len(product))))
        none = total[:0]
        return Moments(count, none[:, 0], none, none, torch.eye(len(total)).to(total), total)

    def solve(self, moments: Moments) -> Tensor:
        """Return the sum."""
        return (moments.cross + moments.cross.mT) / 2


UNMET = (
    "DecoupledDescent: the backward pass was not met, so that the curvature is unknown. Something "
    "between the decoupled layer and the loss hands on another tensor than the one that it made of "
    "what it received: an extension in C++, as_subclass, or torch._C functions. Remedy: construct "
    'with curvature="probe_create_graph" and call loss.backward(create_graph=True); or, where the '
    'inputs are a mixture of Gaussians of known components, with curvature="stein" and '
    "noise=dd.NoiseModel.isotropic(inputs, components), which needs no second derivative."
)


def _differentiate(backward: BackwardResult, direction: Tensor, *, keep_graph: bool) -> Tensor:
    if not backward.gradient.requires_grad:
        raise RuntimeError(
            "DecoupledDescent: this curvature differentiates the gradient once more; call "
            "loss.backward(create_graph=True), or choose another curvature"
        )
    (product,) = torch.autograd.grad(
        backward.gradient,
        backward.edge,
        grad_outputs=direction,
        retain_graph=keep_graph,
        allow_unused=True,
    )
    # A loss that is linear in R has no second derivative at all.
    return torch.zeros_like(direction) if product is None else product
