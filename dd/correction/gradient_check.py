"""Whether weights and weight gradients are still those that the shadows belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dd.correction.gradient_terms import ProjectedTerm, along
from dd.functional import all_finite, at_least_single
from dd.support.blocks import row_blocks, tall_product
from dd.support.ranks import Ranks
from dd.support.rounding import product_rounding

__all__ = [
    "GradientComparison",
    "edit_scale",
    "edited",
    "require_unedited",
    "same_weight",
    "scale_of_terms",
    "weight_changed",
]

# The matrix product behind the weight gradient rounds each term by about a unit in the last place
# and loses up to about √n/16 more in its longest sums; measured up to 3 for n up to 300 000.
_UNITS_IN_THE_LAST_PLACE = 32
_LONG_SUM = 256

_SAME_WEIGHT_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class GradientComparison:
    """A weight gradient beside the one that the backward pass delivered.

    GᵀX = ∂L/∂weight is compared along the random directions U of the inputs: (∂L/∂weight) U against
    Gᵀ(XU), or against what backward passes were seen to add to it. The shadows follow G. They would
    part from the weights if the weights moved along anything else than a multiple of it. Nothing is
    read back from the device.

    Attributes:
        arrived: Uᵀ(∂L/∂weight)ᵀ, shape (j, k).
        delivered: (XU)ᵀG, or the sum of what was seen, shape (j, k).
        tolerance: what rounding may add to it, shape (j, k).
        rounding: relative error of one product.
        unit: of the weight gradient over that of G.
    """

    arrived: Tensor
    delivered: Tensor
    tolerance: Tensor
    rounding: float
    unit: Tensor | float = 1.0

    @classmethod
    def of(
        cls,
        weight_gradient: Tensor,
        gradient: Tensor,
        directions: Tensor,
        projections: Tensor,
        ranks: Ranks,
        *,
        scaled: bool = False,
    ) -> "GradientComparison":
        """Compare.

        Args:
            weight_gradient: ∂L/∂weight, shape (k, d).
            gradient: G, shape (m, k).
            directions: Uᵀ, shape (j, d).
            projections: XU, shape (m, j).
            ranks: which share the rows, and average their weight gradients.
            scaled: whether both are brought to a size of one first, as sums over a scaled loss may
                be out of range.
        """
        rounding = max(product_rounding(gradient), product_rounding(weight_gradient))
        gradient, weight_gradient = at_least_single(gradient), at_least_single(weight_gradient)
        unit: Tensor | float = 1.0
        if scaled:
            gradient, size = _of_size_one(gradient, ranks)
            weight_gradient, weight_size = _of_size_one(weight_gradient)
            unit = weight_size.double() / size.double()
        arrived = directions.to(gradient) @ weight_gradient.mT
        delivered, tolerance = _delivered(gradient, projections, rounding, ranks)
        return cls(arrived, delivered, tolerance, rounding, unit)

    @classmethod
    def of_terms(
        cls, weight_gradient: Tensor, terms: Sequence[ProjectedTerm], directions: Tensor
    ) -> "GradientComparison":
        """Compare with the terms of which it should be the sum.

        Args:
            weight_gradient: ∂L/∂weight, shape (k, d).
            terms: what each backward pass added to it.
            directions: Uᵀ, shape (j, d).
        """
        own = torch.finfo(weight_gradient.dtype).eps
        rounding = max(own, *(term.rounding for term in terms))
        delivered = torch.stack([term.along for term in terms])
        # An edit, or the addition of a term, rounds every number by itself, so that along a random
        # direction the errors add up as squares. Sums on the way may be larger than the last one.
        size = torch.linalg.vector_norm(weight_gradient.double(), dim=1)
        size = size + delivered.square().mean(1).sqrt().sum(0)
        tolerance = (_UNITS_IN_THE_LAST_PLACE * rounding * size).expand_as(delivered[0])
        arrived = along(weight_gradient, directions)
        return cls(arrived, delivered.sum(0), tolerance, rounding)

    def scale(self) -> float | None:
        """By which scale the two differ: 1 where they agree, None where by more than a scale."""
        if bool(self.is_same()):
            return 1.0
        scale, is_multiple = self.multiple
        return float(scale) if bool(is_multiple) else None

    def is_same(self) -> Tensor:
        """Whether the two agree up to rounding, shape ()."""
        b, tolerance = self._delivered, self.tolerance.double()
        within = (self.unit * self._arrived - b).abs() <= tolerance
        size = self._size
        # Where rounding is coarse, all of it together still tells a scale from 1.
        off = (self._scale * self.unit - 1).abs() * size
        allowed = (b * tolerance).square().sum().sqrt() * (4 / _UNITS_IN_THE_LAST_PLACE)
        # Nothing tells the scale of a gradient of zero.
        is_one = off <= torch.maximum(allowed, _SAME_WEIGHT_TOLERANCE * size)
        return within.all() & all_finite(tolerance).all() & is_one

    @cached_property
    def multiple(self) -> tuple[Tensor, Tensor]:
        """The scale of least squares between the two, and whether they agree up to it.

        Returns:
            The scale, and the answer; each of shape ().
        """
        scale = self._scale
        # An edit rounds the gradient once more.
        tolerance = scale.abs() * self.tolerance + 4 * self.rounding * self.arrived.abs().amax()
        within = (self._arrived - scale * self._delivered).abs() <= tolerance
        return scale * self.unit, within.all() & all_finite(tolerance).all() & (scale != 0)

    @cached_property
    def _arrived(self) -> Tensor:
        return self.arrived.double()

    @cached_property
    def _delivered(self) -> Tensor:
        return self.delivered.double()

    @cached_property
    def _size(self) -> Tensor:
        return self._delivered.square().sum()

    @cached_property
    def _scale(self) -> Tensor:
        smallest = torch.finfo(self._size.dtype).tiny
        return (self._arrived * self._delivered).sum() / self._size.clamp_min(smallest)


def scale_of_terms(
    weight_gradient: Tensor, terms: Sequence[ProjectedTerm], directions: Tensor
) -> float:
    """As :func:`edit_scale`, from the terms that backward passes were seen to add.

    Args:
        weight_gradient: ∂L/∂weight, shape (k, d), finite.
        terms: one a backward pass, at least one.
        directions: Uᵀ, shape (j, d).

    Returns:
        The scale; 1 where the two agree up to rounding.

    Raises:
        RuntimeError: if it is neither their sum nor a multiple of it.
    """
    if len(terms) == 1 and torch.equal(along(weight_gradient, directions), terms[0].along):
        return 1.0
    scale = GradientComparison.of_terms(weight_gradient, terms, directions).scale()
    if scale is None:
        raise RuntimeError(edited(Ranks()))
    return scale


def edit_scale(
    weight_gradient: Tensor,
    gradient: Tensor,
    directions: Tensor,
    projections: Tensor,
    ranks: Ranks,
) -> float:
    """By which scale the weight gradient differs from the one that the backward pass delivered.

    Args:
        weight_gradient: ∂L/∂weight, shape (k, d), finite.
        gradient: G, shape (m, k), finite.
        directions: Uᵀ, shape (j, d).
        projections: XU, shape (m, j).
        ranks: as in :meth:`GradientComparison.of`.

    Returns:
        The scale; 1 where the two agree up to rounding.

    Raises:
        RuntimeError: if they differ by more than a scale.
    """
    for scaled in (False, True):
        both = weight_gradient, gradient, directions, projections, ranks
        scale = GradientComparison.of(*both, scaled=scaled).scale()
        if scale is not None:
            return scale
    raise RuntimeError(edited(ranks))


def edited(ranks: Ranks) -> str:
    """What to say of a weight gradient that is no multiple of the one delivered."""
    return (
        "DecoupledDescent: the gradient of the decoupled layer's weight is not the one that the "
        "last backward passes delivered, nor a multiple of it, so weights and shadows would part. "
        "It holds older gradients (call zero_grad() after every step), or it was edited entry by "
        "entry (clip by norm instead of by value), or the loss has a term in the weights "
        f"themselves (use weight_decay= for an L2 penalty){_on_processes(ranks)}."
    )


def require_unedited(
    found: Tensor,
    gradient: Tensor,
    direction: Tensor,
    projection: Tensor,
    name: str,
    *,
    scale: float,
    ranks: Ranks,
) -> None:
    """Check that a gradient is the one delivered, times the scale of the decoupled weight's.

    Args:
        found: gradient of a parameter, shape (o, i).
        gradient: gradient of what it yields, shape (m, o).
        direction: shape (i,).
        projection: the parameter's inputs along the direction, shape (m,).
        name: of the parameter, for the error.
        scale: as :func:`edit_scale` returns it.
        ranks: which share the rows.

    Raises:
        RuntimeError: if the two sides differ by more than rounding.
    """
    rounding = max(product_rounding(gradient), product_rounding(found))
    gradient, size = _of_size_one(gradient, ranks)
    found, found_size = _of_size_one(found)
    arrived = found @ direction.to(gradient) * (found_size / size / scale)
    delivered, tolerance = _delivered(gradient, projection.unsqueeze(1), rounding, ranks)
    # Where all rows push alike their sum is many times as large as what it is compared by; it was
    # itself rounded, brought to another size and scaled.
    tolerance = tolerance + 4 * rounding * arrived.abs().amax()
    if bool(((arrived - delivered).abs() <= tolerance).all()):
        return
    raise RuntimeError(
        f"DecoupledDescent: the gradient of {name} is not the one that the last backward passes "
        f"delivered{'' if scale == 1 else f' times {scale:.4g}, the scale of the first layer'}; "
        "head=True follows it. Call zero_grad() after every step, edit all gradients by one scale "
        "(clip by the norm of all of them), and keep terms in the weights out of the loss."
    )


def _of_size_one(gradient: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """A gradient over about its largest entry, and that; sums over a scaled one may be infinite."""
    gradient = at_least_single(gradient)
    size = gradient.abs().amax()
    if ranks is not None:
        size = ranks.sum(size) / ranks.size
    size = size.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / size, size


def _delivered(
    gradient: Tensor, projections: Tensor, rounding: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """(XU)ᵀG, shape (j, k), as ranks average it, and what rounding may add to it."""
    projections = projections.to(gradient)
    delivered = tall_product(projections, gradient)
    squares = gradient.new_zeros(gradient.shape[1])
    for rows in row_blocks(len(gradient), gradient.shape[1], gradient.device):
        squares += gradient[rows].square().sum(0)
    # No less than Σ_i (|x_iᵀu| + their root mean square) |g_i|, by Cauchy and Schwarz: a sample
    # whose projection happens to be small still rounds like one of ordinary size.
    length = max(1.0, (len(projections) / _LONG_SUM) ** 0.5)
    units = 2 * _UNITS_IN_THE_LAST_PLACE * length * rounding
    tolerance = torch.outer(units * projections.square().sum(0).sqrt(), squares.sqrt())
    if ranks.size > 1:
        delivered, tolerance = ranks.sum(torch.stack([delivered, tolerance])) / ranks.size
    return delivered, tolerance


def same_weight(weight: Tensor, direction: Tensor, expected: Tensor) -> Tensor:
    """Whether along one random direction u the weight is the one the last step left, shape ().

    Args:
        weight: shape (k, d).
        direction: u, shape (d,).
        expected: weight @ u after the last step, shape (k,).
    """
    found = at_least_single(weight)
    found = found @ direction.to(found)
    expected = expected.to(found)
    tolerance = _SAME_WEIGHT_TOLERANCE / len(expected) ** 0.5
    largest = torch.linalg.vector_norm(found - expected, torch.inf)
    return largest <= tolerance * torch.linalg.vector_norm(expected)


def weight_changed(name: str) -> str:
    """What to say of a weight that is not the one the last step left."""
    return (
        f"DecoupledDescent: {name} was changed outside step(), and the "
        "shadows do not fit it. Restore model and optimizer together (load_state_dict of both), "
        "or start over with detach() and attach(); constrain weights with weight_decay=."
    )


def _on_processes(ranks: Ranks) -> str:
    distributed = torch.distributed
    if ranks.size > 1:
        return ", or the processes do not average it (wrap the model in DistributedDataParallel)"
    if distributed.is_available() and distributed.is_initialized():
        return ", or processes average it, which the optimizer was told to be apart (process_group)"
    return ""
