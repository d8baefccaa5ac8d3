"""The mathematics of decoupled descent as pure functions of tensors.

Equation and section numbers are those of ``docs/theory.md``. Leading batch dimensions are allowed
everywhere and are written ``...``. The symbols:

=====  ==========  ==========================================================================
n                  samples
k                  width of the decoupled layer
B                  eigenvalue bins of the noise covariance; one bin when the noise is isotropic
R      (n, k)      corrected pre-activations
L                  the loss that is differentiated, however it is reduced over samples
G      (n, k)      ∂L/∂R, one row a sample
H      (k, k)      Σ_i ∂²L/∂r_i², the curvature of L in the pre-activations
Q      (B, n, k)   shadows: how far each sample's pre-activation would move without that sample
λ      (B,)        noise variance per coordinate
τ      (B,)        noise mass E‖z‖² of each bin, λ times the bin's dimension
C                  scores, the outputs of the network's last linear layer, the *head*
U      (n, m)      coordinates of the inputs along the component means, and 1 for a bias
Φ      (n, f)      inputs of the head, and 1 for its bias
=====  ==========  ==========================================================================

Everything is written for the loss as it is differentiated. When L is a mean over n samples, G and H
are the per-sample gradient over n and the mean curvature; when L is a sum they are n times larger,
and so is the gradient of the weights. No formula below has to know which.
"""

import functools

import torch
from torch import Tensor

from dd.support.blocks import row_blocks

__all__ = [
    "all_finite",
    "at_least_single",
    "centre_within_components",
    "component_counts",
    "component_sums",
    "correct_preactivation_",
    "corrected_preactivation",
    "damped_weight_gradient",
    "driven",
    "kink_curvature",
    "kink_signs",
    "kink_terms",
    "probe_curvature",
    "rademacher",
    "scaled_by_mass",
    "shadow_decay",
    "shadow_gradient",
    "shared_curvature",
    "shared_push",
    "shared_shadow_gradient",
    "softmax_curvature",
    "solved_curvature",
    "stein_curvature",
    "stein_excess",
    "stein_mismatch",
    "symmetric_curvature",
]


# Rows by which the units with a ReLU behind them are known.
_ROWS_THAT_TELL = 1024

# Numbers that a temporary of :func:`shared_curvature` holds at most.
_AT_A_TIME = 2**24


def corrected_preactivation(preactivation: Tensor, shadow: Tensor) -> Tensor:
    """Add the shadows to a pre-activation: R = XW + Σ_b Q_b.

    Args:
        preactivation: XW, shape (..., n, k). A bias may be counted in.
        shadow: Q, shape (..., B, n, k).

    Returns:
        R, shape (..., n, k), in the dtype of ``preactivation``.
    """
    return preactivation + _summed_over_bins(shadow).to(preactivation.dtype)


@torch.no_grad()
def correct_preactivation_(preactivation: Tensor, shadow: Tensor) -> Tensor:
    """The same in the memory of XW, whose derivatives are those of R; autograd does not see it.

    Args:
        preactivation: XW, shape (n, k), which nothing has used yet; becomes R.
        shadow: Q, shape (B, n, k).

    Returns:
        R, the same tensor.
    """
    bins, count, width = shadow.shape
    for rows in row_blocks(count, bins * width, shadow.device):
        preactivation[rows].add_(_summed_over_bins(shadow[:, rows]).to(preactivation.dtype))
    return preactivation


def _summed_over_bins(shadow: Tensor) -> Tensor:
    return shadow.squeeze(-3) if shadow.shape[-3] == 1 else shadow.sum(-3)


def shadow_gradient(
    shadow: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    eigenvalues: Tensor,
    mass: Tensor,
    damping: float = 1.0,
    relative_mass: Tensor | None = None,
) -> Tensor:
    """Gradient that drives the shadows: ∇Q_b = ρ λ_b Q_b H − τ_b G, equations (1) and (3).

    Where samples carry unequal noise, row i of τ_b G is scaled by ‖z_i‖² over its mean.

    A linear optimizer that applies to Q what it applies to W, with this in place of the gradient,
    keeps Q equal to the leave-one-out displacement of every sample.

    Args:
        shadow: Q, shape (..., B, n, k).
        gradient: G, shape (..., n, k).
        curvature: H, shape (..., k, k), symmetric.
        eigenvalues: λ, shape (..., B).
        mass: τ, shape (..., B).
        damping: ρ; 1 leaves gradient descent's own update of W.
        relative_mass: ‖z_i‖² over its mean, shape (..., n); equal masses by default.

    Returns:
        ∇Q, shape (..., B, n, k), in the dtype of ``shadow``.
    """
    decay = shadow_decay(damping * curvature, eigenvalues.to(shadow.dtype))
    gradient = scaled_by_mass(gradient.to(shadow.dtype), relative_mass)
    return driven(shadow, gradient, decay, mass.to(shadow.dtype))


def shadow_decay(curvature: Tensor, eigenvalues: Tensor) -> Tensor:
    """λ_b H of every bin.

    Args:
        curvature: H, shape (..., k, k).
        eigenvalues: λ, shape (..., B).

    Returns:
        Shape (..., B, k, k), in the dtype of ``eigenvalues``.
    """
    return eigenvalues[..., None, None] * curvature.to(eigenvalues.dtype).unsqueeze(-3)


def driven(shadow: Tensor, gradient: Tensor, decay: Tensor, mass: Tensor) -> Tensor:
    """Q_b D_b − τ_b G.

    Args:
        shadow: Q, shape (..., B, n, k).
        gradient: G, shape (..., n, k), in the same dtype.
        decay: D, shape (..., B, k, k), likewise.
        mass: τ, shape (..., B), likewise.

    Returns:
        Shape (..., B, n, k).
    """
    push = mass[..., None, None] * gradient.unsqueeze(-3)
    # One product of all bins, and no intermediate result of their size.
    moved = push.flatten(0, -3).baddbmm_(shadow.flatten(0, -3), decay.flatten(0, -3), beta=-1.0)
    return moved.unflatten(0, shadow.shape[:-2])


def damped_weight_gradient(
    weight_gradient: Tensor,
    weight: Tensor,
    curvature: Tensor,
    noise_variance: Tensor | float,
    damping: float,
) -> Tensor:
    """Gradient of the decoupled layer less a share of its own drift: XᵀG − (1 − ρ) λ W H.

    Section 6 of ``docs/theory.md``; defined for isotropic noise. Arguments are laid out as
    :class:`torch.nn.Linear` stores them, transposed with respect to the mathematics.

    Args:
        weight_gradient: ∂L/∂weight = GᵀX, shape (..., k, d).
        weight: Wᵀ, shape (..., k, d).
        curvature: H, shape (..., k, k), symmetric.
        noise_variance: λ, a scalar or shape (..., 1, 1).
        damping: ρ; 1 returns ``weight_gradient`` unchanged, 0 removes the whole drift.

    Returns:
        The gradient to descend, shape (..., k, d).
    """
    drift = curvature.to(weight.dtype) @ weight
    return weight_gradient - (1.0 - damping) * noise_variance * drift


def centre_within_components(values: Tensor, components: Tensor, num_components: int) -> Tensor:
    """Subtract from every row the mean of its mixture component: R − E[R | a].

    Args:
        values: shape (..., n, k).
        components: component of each row, shape (n,) or (..., n), integers in [0, num_components).
        num_components: number of components.

    Returns:
        Centred values, shape (..., n, k).
    """
    # A product instead of index_add, whose order of summation is not fixed on CUDA.
    membership = torch.nn.functional.one_hot(components, num_components).to(values.dtype)
    counts = membership.sum(-2).clamp_min(1)
    means = membership.mT @ values / counts.unsqueeze(-1)
    if components.dim() == 1:
        return values - means.index_select(-2, components)
    return values - membership @ means


def component_sums(values: Tensor, components: Tensor, num_components: int) -> Tensor:
    """Sum the rows of each mixture component, in the same order at every call.

    Args:
        values: shape (n, k).
        components: component of each row, shape (n,), integers in [0, num_components).
        num_components: number of components C.

    Returns:
        Shape (C, k).
    """
    if values.device.type == "cpu":
        sums = values.new_zeros(num_components, values.shape[1])
        return sums.index_add_(0, components, values)
    # A product instead of index_add, whose order of summation is not fixed on CUDA.
    total = values.new_zeros(num_components, values.shape[1])
    for rows in row_blocks(len(values), num_components, values.device):
        total.addmm_(_membership(components[rows], num_components).to(values.dtype), values[rows])
    return total


def component_counts(components: Tensor, num_components: int) -> Tensor:
    """Count the rows of each mixture component.

    Args:
        components: component of each row, shape (n,), integers in [0, num_components).
        num_components: number of components C.

    Returns:
        Integers, shape (C,).
    """
    if components.device.type == "cpu":
        return torch.bincount(components, minlength=num_components)
    # Counting by bincount waits for the device.
    blocks = row_blocks(len(components), num_components, components.device)
    counts = [_membership(components[rows], num_components).sum(1) for rows in blocks]
    return torch.stack(counts).sum(0)


def _membership(components: Tensor, num_components: int) -> Tensor:
    return torch.arange(num_components, device=components.device).unsqueeze(1) == components


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all numbers of each tensor are finite; no where their sum exceeds the range, too.

    Many times as fast as to look at each number.

    Args:
        tensors: of any shapes, on one device.

    Returns:
        One flag a tensor.
    """
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([(s.abs() if s.is_complex() else s).float() for s in sums]).isfinite()


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
    values, directions, known = _eigenbasis(covariance, ridge)
    rotated = directions.mT @ cross @ directions
    solution = (rotated + rotated.mT) / (values.unsqueeze(-1) + values.unsqueeze(-2))
    found = _symmetrised(directions @ solution @ directions.mT)
    return torch.where((finite & known)[..., None, None], found, torch.nan)


def _eigenbasis(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
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
    return _symmetrised(torch.linalg.solve_ex(covariance, cross)[0])


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


def softmax_curvature(scores: Tensor, weights: Tensor) -> Tensor:
    """Curvature of weighted softmax cross-entropy in the scores: P_i = w_i (diag p_i − p_i p_iᵀ).

    Args:
        scores: shape (..., n, C).
        weights: w, weight of each sample in L, shape (..., n).

    Returns:
        P, shape (..., n, C, C).
    """
    p = torch.softmax(at_least_single(scores), -1)
    return weights[..., None, None] * (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))


def shared_curvature(
    score_curvature: Tensor, jacobian: Tensor, signal: Tensor, features: Tensor
) -> Tensor:
    """Gauss-Newton curvature of L in the shared parameters ψ = (Ω, A), equation (4).

    Sample i's scores depend on Ω, shape (k, m), through R_i + Ω u_i, and on the head A, shape
    (C, f), through A φ_i.

    Args:
        score_curvature: P, shape (..., n, C, C), symmetric.
        jacobian: M_i = ∂scores_i/∂r_i, shape (..., n, C, k).
        signal: U, shape (..., n, m); m may be 0.
        features: Φ, shape (..., n, f).

    Returns:
        Σ_i J_iᵀ P_i J_i with J_i = (M_i ⊗ u_iᵀ, I ⊗ φ_iᵀ), shape (..., p, p), p = km + Cf.
    """
    # A pair of features and a pair of units for every sample at once would not fit in memory.
    samples = max(1, _AT_A_TIME // max(features.shape[-1], jacobian.shape[-1]) ** 2)
    blocks = zip(
        score_curvature.split(samples, -3),
        jacobian.split(samples, -3),
        signal.split(samples, -2),
        features.split(samples, -2),
        strict=True,
    )
    return functools.reduce(torch.add, (_shared_curvature_of(*block) for block in blocks))


def _shared_curvature_of(p: Tensor, jacobian: Tensor, signal: Tensor, features: Tensor) -> Tensor:
    through = p @ jacobian
    in_layer = _summed_kronecker(jacobian.mT @ through, _outer(signal, signal))
    across = _summed_kronecker(through.mT, _outer(signal, features))
    in_head = _summed_kronecker(p, _outer(features, features))
    return torch.cat([torch.cat([in_layer, across], -1), torch.cat([across.mT, in_head], -1)], -2)


def shared_shadow_gradient(
    shadow: Tensor,
    gradient: Tensor,
    score_gradient: Tensor,
    signal: Tensor,
    features: Tensor,
    curvature: Tensor,
) -> Tensor:
    """Gradient that drives the shadows of the shared parameters: ∇ψ_i = H_ψ ψ_i − ∂L_i/∂ψ.

    Equation (4).

    Args:
        shadow: for each sample its displacement of Ω and A, flattened, shape (..., n, p).
        gradient: G, shape (..., n, k).
        score_gradient: E = ∂L/∂scores, shape (..., n, C).
        signal: U, shape (..., n, m).
        features: Φ, shape (..., n, f).
        curvature: H_ψ, shape (..., p, p), symmetric.

    Returns:
        The gradient, shape (..., n, p), in the dtype of ``shadow``.
    """
    push = shared_push(gradient, score_gradient, signal, features)
    return shadow @ curvature.to(shadow.dtype) - push.to(shadow.dtype)


def shared_push(
    gradient: Tensor, score_gradient: Tensor, signal: Tensor, features: Tensor
) -> Tensor:
    """Gradient of each sample's loss in the shared parameters, ∂L_i/∂ψ; arguments as above.

    Returns:
        Shape (..., n, p).
    """
    return torch.cat(
        [_outer(gradient, signal).flatten(-2), _outer(score_gradient, features).flatten(-2)], -1
    )


def stein_excess(
    centred: Tensor, gradient: Tensor, probe: Tensor, product: Tensor
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
    return total / scale, total / ((unexplained - scatter).std(-1) * n**0.5)


def stein_mismatch(
    centred: Tensor,
    gradient: Tensor,
    probe: Tensor,
    product: Tensor,
    kinks: Tensor,
    ridge: float = 1e-4,
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

    Returns:
        The norm of the difference beyond its expectation over the norm of the probe's curvature,
        and by how many standard errors Σ (difference / standard error)² exceeds its expectation;
        each of shape (...), not a number where a variance vanishes.
    """
    centred, gradient = at_least_single(centred), at_least_single(gradient)
    probe, product = at_least_single(probe), at_least_single(product)
    kinks = at_least_single(kinks)
    n, k = centred.shape[-2:]
    values, directions, finite = _eigenbasis(centred.mT @ centred / n, ridge)
    centred, gradient, probe, product = (
        rows @ directions for rows in (centred, gradient, probe, product)
    )
    # The mean of both sides' eigenvalues, by which Stein's symmetrised products are divided.
    sizes = (values.unsqueeze(-1) + values.unsqueeze(-2)) / 2
    stein = _symmetrised(centred.mT @ gradient) / sizes
    # Products regressed on the probe: what is left to chance is what that leaves unexplained.
    regressed = torch.linalg.solve_ex(probe.mT @ probe / n, probe.mT @ product)[0]
    squares = directions.square()
    at_kinks = directions.mT @ torch.diag_embed(kinks.sum(-2)) @ directions
    probed = _symmetrised(regressed) + at_kinks
    unexplained = gradient - centred @ stein / n
    scatter = product - probe @ regressed / n
    variance = (
        _summed_products(centred, unexplained, centred, unexplained) / sizes.square()
        - 2 * _summed_products(centred, unexplained, probe, scatter) / sizes
        + _summed_products(probe, scatter, probe, scatter)
        + squares.mT @ torch.diag_embed(kinks.square().sum(-2)) @ squares
    )
    found = (stein - probed).square()
    beyond = (found - variance).sum((-2, -1)).clamp_min(0).sqrt()
    count = k * (k + 1) / 2
    chance = (found / variance - 1).triu().sum((-2, -1)) / (2 * count) ** 0.5
    share = beyond / torch.linalg.matrix_norm(probed)
    return torch.where(finite, share, torch.nan), torch.where(finite, chance, torch.nan)


def _summed_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Σ_i sym(a_i b_iᵀ) ∘ sym(c_i d_iᵀ), shape (..., k, k), of rows (..., n, k)."""
    return _symmetrised((a * c).mT @ (b * d) + (a * d).mT @ (b * c)) / 2


def scaled_by_mass(rows: Tensor, relative_mass: Tensor | None) -> Tensor:
    """Scale each sample's row by its noise mass.

    Args:
        rows: shape (..., n, k).
        relative_mass: ‖z_i‖² over its mean, shape (..., n); None where all are equal.

    Returns:
        The scaled rows, shape (..., n, k).
    """
    if relative_mass is None:
        return rows
    return relative_mass.to(rows).unsqueeze(-1) * rows


def rademacher(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent entries ±1 with equal probability, shaped and typed as ``like``.

    Args:
        like: gives shape, dtype and device.
        generator: source of randomness on the same device; torch's global one by default.

    Returns:
        A tensor of ±1.
    """
    bits = torch.empty_like(like, requires_grad=False).bernoulli_(0.5, generator=generator)
    return bits.mul_(2).sub_(1)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own dtype where that is more precise."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _symmetrised(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _summed_kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i left_i ⊗ right_i: (..., n, a, b) and (..., n, s, t) to (..., as, bt)."""
    (a, b), (s, t) = left.shape[-2:], right.shape[-2:]
    products = left.flatten(-2).mT @ right.flatten(-2)
    blocks = products.unflatten(-1, (s, t)).unflatten(-3, (a, b))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
