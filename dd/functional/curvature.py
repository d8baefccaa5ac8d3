"""The curvature of the loss in the pre-activations."""

import torch
from torch import Tensor

from dd.functional.arithmetic import at_least_single, scaled_by_mass, symmetrised

__all__ = [
    "eigenbasis",
    "kink_curvature",
    "kink_signs",
    "kink_terms",
    "probe_curvature",
    "solved_curvature",
    "stein_curvature",
    "symmetric_curvature",
]

# Rows by which the units with a ReLU behind them are known.
_ROWS_THAT_TELL = 1024


def stein_curvature(centred: Tensor, gradient: Tensor, ridge: float = 1e-4) -> Tensor:
    """Curvature by Stein's lemma: the symmetric H closest to K H = R_cᵀ G, with K = R_cᵀR_c / n.

    Given its component a row of R is Gaussian with covariance K, so that
    E[(R − E[R|a]) gᵀ] = K E[∂g/∂r]. No second derivative is taken, so the kinks of a ReLU are
    counted in.

    Args:
        centred: R centred within components, shape (..., n, k).
        gradient: G, shape (..., n, k).
        ridge: ε relative to the mean eigenvalue of K.

    Returns:
        H, shape (..., k, k), symmetric, in float32 at least.
    """
    centred, gradient = at_least_single(centred), at_least_single(gradient)
    covariance = centred.mT @ centred / centred.shape[-2]
    return symmetric_curvature(covariance, centred.mT @ gradient, ridge)


def symmetric_curvature(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve K H + H K + 2εH = C + Cᵀ: the symmetric least-squares solution of K H = C.

    Where K hardly varies along some directions, (K + εI)⁻¹C is noise over small numbers there, and
    to symmetrise it afterwards would spread that noise over all of H. Section 5 of
    ``docs/theory.md``.

    Args:
        covariance: K, shape (..., k, k), symmetric and not negative.
        cross: C, shape (..., k, k).
        ridge: ε relative to the mean eigenvalue of K, positive.

    Returns:
        H, shape (..., k, k), symmetric; not a number where K or C is not finite.
    """
    finite = cross.isfinite().all(-1).all(-1)
    values, directions, known = eigenbasis(covariance, ridge)
    rotated = directions.mT @ cross @ directions
    solution = (rotated + rotated.mT) / (values.unsqueeze(-1) + values.unsqueeze(-2))
    found = symmetrised(directions @ solution @ directions.mT)
    return torch.where((finite & known)[..., None, None], found, torch.nan)


def eigenbasis(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of K + εI (..., k), its directions (..., k, k), and whether K is finite (...)."""
    finite = covariance.isfinite().all(-1).all(-1)
    values, directions = torch.linalg.eigh(torch.where(finite[..., None, None], covariance, 0.0))
    # A layer at zero has K = 0; the floor makes its curvature zero instead of 0/0.
    epsilon = (ridge * values.mean(-1)).clamp_min(torch.finfo(values.dtype).tiny)
    return values.clamp_min(0.0) + epsilon.unsqueeze(-1), directions, finite


def probe_curvature(probe: Tensor, product: Tensor, kinks: Tensor | None = None) -> Tensor:
    """Curvature from one curvature-vector product: H = n (VᵀV)⁻¹ Vᵀ(HV), symmetrised.

    One independent Rademacher row a sample is enough, because the product is averaged over samples.

    Args:
        probe: V, shape (..., n, k), entries ±1.
        product: row i is (∂²L/∂r_i²) v_i, shape (..., n, k).
        kinks: what the derivative of G does not see (:func:`kink_curvature`), shape (..., k).

    Returns:
        H, shape (..., k, k), symmetric, in float32 at least; not finite where VᵀV is singular,
        as it is for n < k.
    """
    probe, product = at_least_single(probe), at_least_single(product)
    found = solved_curvature(probe.mT @ probe / probe.shape[-2], probe.mT @ product)
    return found if kinks is None else found + torch.diag_embed(kinks)


def solved_curvature(covariance: Tensor, cross: Tensor) -> Tensor:
    """Solve K H = C and symmetrise.

    Args:
        covariance: K, shape (..., k, k), symmetric and not negative.
        cross: C, shape (..., k, k).

    Returns:
        H, shape (..., k, k), symmetric; not finite where K is singular.
    """
    return symmetrised(torch.linalg.solve_ex(covariance, cross)[0])


def kink_curvature(
    preactivation: Tensor,
    gradient: Tensor,
    relative_mass: Tensor | None = None,
    *,
    leaky: bool = False,
) -> Tensor:
    """What the kinks of a piecewise linear activation at 0 add to the curvature of each unit.

    The derivative of G jumps there, so that no pointwise second derivative sees it: unit j's share
    is f_j(0) E[jump of g_j at r_j = 0] with f_j the density of r_j. Both factors together are a
    kernel sum over the samples next to the kink; the kernel 4 − 6u on each side is the linear
    boundary kernel, of bias h², h = n^(-1/5) standard deviations. Section 5 of ``docs/theory.md``.

    A unit has a ReLU behind it where G vanishes for every negative pre-activation; its jump is G
    next to 0 from above. Others get zero, or, ``leaky``, the jump between both sides.

    Args:
        preactivation: R, shape (..., n, k).
        gradient: G, shape (..., n, k).
        relative_mass: ‖z_i‖² over its mean, shape (..., n); equal masses by default.
        leaky: whether units with another kink at 0, such as a leaky ReLU's, are behind.

    Returns:
        Shape (..., k), in float32 at least.
    """
    signs = kink_signs(preactivation, gradient)
    return kink_terms(preactivation, gradient, signs, relative_mass, leaky=leaky).sum(-2)


def kink_signs(preactivation: Tensor, gradient: Tensor) -> Tensor:
    """Sums over samples that tell which units have a ReLU behind them, and how R is spread.

    Of samples spread over processes they may be added up.

    Args:
        preactivation: R, shape (..., n, k).
        gradient: G, shape (..., n, k).

    Returns:
        Of each unit the number of samples, ΣR, ΣR², and among a thousand of them how many are
        negative and how many of these have a gradient; shape (..., 5, k).
    """
    rows, pushes = at_least_single(preactivation), at_least_single(gradient)
    some = slice(0, _ROWS_THAT_TELL)
    below = rows[..., some, :] < 0
    pushed = below & (pushes[..., some, :] != 0)
    count = torch.full_like(rows[..., 0, :], rows.shape[-2])
    negative, active = below.sum(-2).to(rows), pushed.sum(-2).to(rows)
    return torch.stack([count, rows.sum(-2), rows.square().sum(-2), negative, active], -2)


def kink_terms(
    preactivation: Tensor,
    gradient: Tensor,
    signs: Tensor,
    relative_mass: Tensor | None = None,
    *,
    leaky: bool = False,
) -> Tensor:
    """Each sample's term of :func:`kink_curvature`.

    Args:
        preactivation: R, shape (..., n, k).
        gradient: G, shape (..., n, k).
        signs: of all samples (:func:`kink_signs`), shape (..., 5, k).
        relative_mass: ‖z_i‖² over its mean, shape (..., n); equal masses by default.
        leaky: whether units with another kink at 0, such as a leaky ReLU's, are behind.

    Returns:
        Shape (..., n, k), in float32 at least.
    """
    rows, pushes = at_least_single(preactivation), at_least_single(gradient)
    count, total, squares, below, pushed = signs.unsqueeze(-2).unbind(-3)
    variance = (squares / count - (total / count).square()).clamp_min(0.0)
    tiny = torch.finfo(rows.dtype).tiny
    width = (variance.sqrt() * count**-0.2).clamp_min(tiny)
    apart = rows / width
    counts = apart.abs() < 1
    if not leaky:
        counts &= (below > 0) & (pushed == 0)
    # Above the kink G counts, below it is taken off; behind a ReLU it is zero there.
    kernel = torch.where(counts, (4 - 6 * apart.abs()) * apart.sign(), 0.0)
    return kernel * scaled_by_mass(pushes, relative_mass) / width
