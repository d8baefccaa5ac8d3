"""How pre-activations are corrected, and what drives the shadows."""

import torch
from torch import Tensor

from dd.functional.arithmetic import scaled_by_mass
from dd.support.blocks import row_blocks

__all__ = [
    "correct_preactivation_",
    "corrected_preactivation",
    "damped_weight_gradient",
    "driven",
    "shadow_decay",
    "shadow_gradient",
]


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
    *,
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
