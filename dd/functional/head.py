"""What all samples share: its curvature and its shadows."""

import functools

import torch
from torch import Tensor

from dd.functional.arithmetic import at_least_single, outer

__all__ = [
    "shared_curvature",
    "shared_sample_gradient",
    "shared_shadow_gradient",
    "softmax_curvature",
]


# Numbers that a temporary of :func:`shared_curvature` holds at most.
_AT_A_TIME = 2**24


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
    in_layer = _summed_kronecker(jacobian.mT @ through, outer(signal, signal))
    across = _summed_kronecker(through.mT, outer(signal, features))
    in_head = _summed_kronecker(p, outer(features, features))
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
    push = shared_sample_gradient(gradient, score_gradient, signal, features)
    return shadow @ curvature.to(shadow.dtype) - push.to(shadow.dtype)


def shared_sample_gradient(
    gradient: Tensor, score_gradient: Tensor, signal: Tensor, features: Tensor
) -> Tensor:
    """Gradient of each sample's loss in the shared parameters, ∂L_i/∂ψ; arguments as above.

    Returns:
        Shape (..., n, p).
    """
    return torch.cat(
        [outer(gradient, signal).flatten(-2), outer(score_gradient, features).flatten(-2)], -1
    )


def _summed_kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i left_i ⊗ right_i: (..., n, a, b) and (..., n, s, t) to (..., as, bt)."""
    (a, b), (s, t) = left.shape[-2:], right.shape[-2:]
    products = left.flatten(-2).mT @ right.flatten(-2)
    blocks = products.unflatten(-1, (s, t)).unflatten(-3, (a, b))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
