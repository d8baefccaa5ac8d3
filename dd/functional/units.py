"""Rows that share noise: sums over the rows of a unit, weighted by its Gram matrix."""

import torch
from torch import Tensor

__all__ = ["gathered_by_unit", "mixed", "scattered_to_units"]


def mixed(values: Tensor, gram: Tensor) -> Tensor:
    """Σ_b T_ab v_b of every row a of every unit (``docs/several-rows.md``).

    Args:
        values: v, shape (u, P, k); zero where a unit has no such row, or it is absent.
        gram: T, shape (u, P, P).

    Returns:
        Shape (u, P, k), in the dtype of ``values``.
    """
    return torch.bmm(gram.to(values), values)


def scattered_to_units(values: Tensor, unit: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """Put rows in their places; rows of one place are added up.

    Args:
        values: shape (m, k).
        unit: of each row, shape (m,).
        place: of each row within its unit, shape (m,).
        shape: (u, P).

    Returns:
        Shape (u, P, k).
    """
    units, places = shape
    found = values.new_zeros(units * places, values.shape[1])
    return found.index_add_(0, unit * places + place, values).view(units, places, -1)


def gathered_by_unit(values: Tensor, unit: Tensor, place: Tensor) -> Tensor:
    """The rows in some places, shape (m, k), of values of shape (u, P, k)."""
    return values[unit, place]
