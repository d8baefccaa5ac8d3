"""A noise model in a line."""

import math
from typing import Any

__all__ = ["described"]


def described(model: Any) -> str:
    """Bins, effective rank (tr Σ)²/tr Σ², n/d, and how the norms vary.

    Args:
        model: a :class:`dd.noise.model.NoiseModel`, which knows this module.
    """
    d = model.dimension
    rank = model.effective_rank
    count = len(model.eigenvalues)
    parts = [f"{count} bin{'s' * (count > 1)}", f"effective rank {rank:.4g} of {d}"]
    if model.units is not None:
        parts.append(str(model.units))
    elif model.fitted_on is not None:
        parts.append(f"n/d {model.fitted_on / d:.3g}")
    if model.norm_variation is not None:
        # The relative deviation of ‖z‖² = Σ λ_j ξ_j² under Gaussian noise.
        gaussian = f" (Gaussian {math.sqrt(2 / rank):.2f})" if rank > 0 else ""
        parts.append(f"norm variation {model.norm_variation:.2f}{gaussian}")
    if model.components is not None:
        parts.append(f"{int(model.components.max()) + 1} components")
    if model.is_followed_exactly:
        parts = [f"{d} inputs, all followed exactly", *parts[2:]]
    elif model.mean_directions is not None:
        parts.append(f"{model.mean_directions.shape[1]} directions of their means apart")
    if model.relative_mass is not None:
        parts.append("a mass for every sample")
    return "noise model: " + ", ".join(parts)
