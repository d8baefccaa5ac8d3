"""How far Stein's curvature is from a probe's."""

import torch
from torch import Tensor

from dd.functional.arithmetic import at_least_single, symmetrised
from dd.functional.curvature import eigenbasis, probe_curvature
from dd.support.blocks import row_blocks

__all__ = ["stein_excess", "stein_mismatch"]


def stein_excess(
    centred: Tensor,
    gradient: Tensor,
    probe: Tensor,
    product: Tensor,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far Stein's lemma exceeds a probe, as a share and in standard errors.

    With the right components tr R_cᵀG and tr K H agree, K = R_cᵀR_c / n and H the probe's. Where a
    component is several clusters, R_c keeps the spread of their means, which the layer has moved
    against the gradient: Stein's side falls short. Both sides are sums over samples, so that the
    standard error is that of a sum of independent terms, H and K taken as fitted to them.

    Args:
        centred: R centred within components, shape (..., n, k).
        gradient: G, shape (..., n, k).
        probe: V, shape (..., n, k), entries ±1.
        product: row i is (∂²L/∂r_i²) v_i, shape (..., n, k).
        unit: of each row, from 0, shape (n,), where rows of one are not independent.

    Returns:
        The difference tr R_cᵀG − tr K H over the nuclear norm of K H, and over its standard error;
        each of shape (...), not a number where nothing varies.
    """
    centred, gradient = at_least_single(centred), at_least_single(gradient)
    probe, product = at_least_single(probe), at_least_single(product)
    n = centred.shape[-2]
    curvature = probe_curvature(probe, product)
    covariance = centred.mT @ centred / n
    unexplained = (centred * (gradient - centred @ curvature / n)).sum(-1)
    scatter = ((probe @ covariance) * (product - probe @ curvature / n)).sum(-1)
    total = unexplained.sum(-1)
    scale = torch.linalg.matrix_norm(covariance @ curvature, "nuc")
    terms = unexplained - scatter
    if unit is not None:
        terms = terms.new_zeros(int(unit.max()) + 1).index_add_(0, unit, terms)
    return total / scale, total / (terms.std(-1) * terms.shape[-1] ** 0.5)


def stein_mismatch(
    centred: Tensor,
    gradient: Tensor,
    probe: Tensor,
    product: Tensor,
    kinks: Tensor,
    ridge: float = 1e-4,
    *,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far Stein's curvature is from a probe's as a matrix, beyond what chance explains.

    The trace of :func:`stein_excess` weighs directions by how much R varies there, and says nothing
    of those where it hardly does. Both estimates are sums over samples, so that the variance of
    each entry of their difference is a sum of squares, taken in the eigenbasis of K, where small
    eigenvalues do not spread. Section 5 of ``docs/theory.md``.

    Args:
        centred: R centred within components, shape (..., n, k).
        gradient: G centred likewise, shape (..., n, k).
        probe: V, shape (..., n, k), entries ±1.
        product: row i is (∂²L/∂r_i²) v_i, shape (..., n, k).
        kinks: what each sample adds at kinks (:func:`kink_terms`), shape (..., n, k).
        ridge: of Stein's estimate (:func:`symmetric_curvature`).
        unit: as in :func:`stein_excess`.

    Returns:
        The norm of the difference beyond its expectation over the norm of the probe's curvature,
        and by how many standard errors Σ (difference / standard error)² exceeds its expectation;
        each of shape (...), not a number where a variance vanishes.
    """
    centred, gradient = at_least_single(centred), at_least_single(gradient)
    probe, product = at_least_single(probe), at_least_single(product)
    kinks = at_least_single(kinks)
    n, k = centred.shape[-2:]
    values, directions, finite = eigenbasis(centred.mT @ centred / n, ridge)
    centred, gradient, probe, product = (
        rows @ directions for rows in (centred, gradient, probe, product)
    )
    # The mean of both sides' eigenvalues, by which Stein's symmetrised products are divided.
    sizes = (values.unsqueeze(-1) + values.unsqueeze(-2)) / 2
    stein = symmetrised(centred.mT @ gradient) / sizes
    # Products regressed on the probe: what is left to chance is what that leaves unexplained.
    regressed = torch.linalg.solve_ex(probe.mT @ probe / n, probe.mT @ product)[0]
    squares = directions.square()
    at_kinks = directions.mT @ torch.diag_embed(kinks.sum(-2)) @ directions
    probed = symmetrised(regressed) + at_kinks
    unexplained = gradient - centred @ stein / n
    scatter = product - probe @ regressed / n
    if unit is None:
        variance = (
            _summed_products(centred, unexplained, centred, unexplained) / sizes.square()
            - 2 * _summed_products(centred, unexplained, probe, scatter) / sizes
            + _summed_products(probe, scatter, probe, scatter)
        )
    else:
        variance = _of_units((centred, unexplained), (probe, scatter), sizes, unit)
        kinks = kinks.new_zeros(int(unit.max()) + 1, k).index_add_(0, unit, kinks)
    variance = variance + squares.mT @ torch.diag_embed(kinks.square().sum(-2)) @ squares
    found = (stein - probed).square()
    beyond = (found - variance).sum((-2, -1)).clamp_min(0).sqrt()
    count = k * (k + 1) / 2
    chance = (found / variance - 1).triu().sum((-2, -1)) / (2 * count) ** 0.5
    share = beyond / torch.linalg.matrix_norm(probed)
    return torch.where(finite, share, torch.nan), torch.where(finite, chance, torch.nan)


def _of_units(
    stein: tuple[Tensor, Tensor], probed: tuple[Tensor, Tensor], sizes: Tensor, unit: Tensor
) -> Tensor:
    """Σ over units of squared sums of their rows' terms, shape (k, k).

    Args:
        stein: R_c and what Stein's curvature leaves of G, each (n, k).
        probed: V and what the probe's leaves of its products, likewise.
        sizes: that the former is divided by, shape (k, k).
        unit: of each row, from 0, shape (n,).
    """
    order, width = unit.argsort(stable=True), sizes.shape[-1]
    ends = torch.bincount(unit).cumsum(0)
    found = torch.zeros_like(sizes)
    for units in row_blocks(len(ends), width * width, unit.device):
        start = 0 if units.start == 0 else int(ends[units.start - 1])
        rows = order[start : int(ends[units.stop - 1])]
        some = unit[rows] - units.start
        each = found.new_zeros(units.stop - units.start, width, width)
        for part, divisor in ((stein, sizes), (probed, -1.0)):
            left, right = (values[rows] for values in part)
            terms = left.unsqueeze(2) * right.unsqueeze(1)
            each.index_add_(0, some, symmetrised(terms) / divisor)
        found += each.square().sum(0)
    return found


def _summed_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Σ_i sym(a_i b_iᵀ) ∘ sym(c_i d_iᵀ), shape (..., k, k), of rows (..., n, k)."""
    return symmetrised((a * c).mT @ (b * d) + (a * d).mT @ (b * c)) / 2
