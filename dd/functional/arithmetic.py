"""Tensors of any kind: precision, finiteness, masses, random signs."""

import torch
from torch import Tensor

__all__ = [
    "all_finite",
    "at_least_single",
    "outer",
    "rademacher",
    "scaled_by_mass",
    "stored_numbers",
    "symmetrised",
]


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


def symmetrised(matrix: Tensor) -> Tensor:
    """The symmetric part of matrices, shape (..., k, k)."""
    return (matrix + matrix.mT) / 2


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Outer products of vectors, shapes (..., a) and (..., b), of shape (..., a, b)."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def stored_numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor: itself, or of a sparse one those that are stored."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
