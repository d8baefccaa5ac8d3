"""How an optimizer's update answers to the gradients, found from the update that it made.

Section 11 of ``docs/theory.md``. Weights and what moves them are laid out as
:class:`torch.nn.Linear` stores them: one row a unit, shape (k, d).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "ResponseFit",
    "combined",
    "fit_across_units",
    "fit_by_unit",
    "fit_of_all_units",
    "without_directions",
]

# Rows of the basis beyond this share of the coordinates leave no freedom to tell a fit by.
_MOST_COLUMNS = 0.9


@dataclass(frozen=True, eq=False)
class ResponseFit:
    """An update as a combination of known quantities.

    Attributes:
        coefficients: one a quantity and unit, shape (p, k); or, across units, shape (p, k, k): what
            unit l of the quantity adds to unit j of the update stands at [., l, j].
        share: of the update's squared size that the combination explains, all units together.
        unexplained: squared size of the rest, per degree of freedom that the fit leaves, times the
            number of coordinates.
        freedom: degrees of freedom that the fit leaves, all units together.
    """

    coefficients: Tensor
    share: float
    unexplained: float
    freedom: int

    @property
    def is_across_units(self) -> bool:
        """Whether units are combined with each other."""
        return self.coefficients.dim() == 3


def fit_by_unit(update: Tensor, basis: Sequence[Tensor], ridge: float) -> ResponseFit | None:
    """Combine each unit's update of the same unit of every quantity, by least squares.

    Args:
        update: U, shape (k, d).
        basis: p quantities, each of shape (k, d).
        ridge: penalty on coefficients of quantities of unit length.

    Returns:
        The fit, in float64; None where d coordinates do not tell p quantities apart.
    """
    if len(basis) > _MOST_COLUMNS * update.shape[1]:
        return None
    target = update.double()
    columns = torch.stack([part.double() for part in basis], 1)
    lengths = _lengths(columns)
    gram = columns @ columns.mT / (lengths.mT * lengths)
    right = (columns @ target.unsqueeze(-1)) / lengths.mT
    found = _solved(gram, right, ridge) / lengths.mT
    rest = target - (found.mT @ columns).squeeze(1)
    return _fit(found.squeeze(-1).mT, target, rest, len(basis))


def fit_across_units(update: Tensor, basis: Sequence[Tensor], ridge: float) -> ResponseFit | None:
    """Combine every unit's update of all units of every quantity, by least squares.

    Args:
        update: U, shape (k, d).
        basis: p quantities, each of shape (k, d).
        ridge: as in :func:`fit_by_unit`.

    Returns:
        The fit, in float64; None where d coordinates do not tell p k columns apart.
    """
    count, (width, dimension) = len(basis), update.shape
    if count * width > _MOST_COLUMNS * dimension:
        return None
    target = update.double()
    columns = torch.cat([part.double() for part in basis])
    lengths = _lengths(columns)
    gram = columns @ columns.mT / (lengths.mT * lengths)
    right = columns @ target.mT / lengths.mT
    found = _solved(gram, right, ridge) / lengths.mT
    rest = target - found.mT @ columns
    return _fit(found.unflatten(0, (count, width)), target, rest, count * width)


def fit_of_all_units(update: Tensor, basis: Sequence[Tensor], ridge: float) -> ResponseFit | None:
    """Combine the update of all units by one coefficient a quantity, by least squares.

    Args:
        update: U, shape (k, d).
        basis: p quantities, each of shape (k, d).
        ridge: as in :func:`fit_by_unit`.

    Returns:
        The fit, in float64, its coefficients repeated for every unit; None where k d numbers do not
        tell p quantities apart.
    """
    flat = [part.reshape(1, -1) for part in basis]
    fit = fit_by_unit(update.reshape(1, -1), flat, ridge)
    if fit is None:
        return None
    coefficients = fit.coefficients.expand(-1, len(update))
    return replace(fit, coefficients=coefficients)


def combined(parts: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Σ_b B_b A_b of the shadows of some quantities.

    Args:
        parts: p shadows, each of shape (..., n, k).
        coefficients: as in :class:`ResponseFit`.

    Returns:
        Shape (..., n, k).
    """
    found = None
    for part, coefficient in zip(parts, coefficients.to(parts[0]), strict=True):
        term = part @ coefficient if coefficient.dim() == 2 else part * coefficient
        found = term if found is None else found.add_(term)
    assert found is not None
    return found


def without_directions(values: Tensor, directions: Tensor | None) -> Tensor:
    """Take some directions of the inputs' space out of weights.

    Args:
        values: shape (k, d).
        directions: orthonormal, shape (d, m), or None.
    """
    if directions is None:
        return values
    basis = directions.to(values)
    return values - (values @ basis) @ basis.mT


def _lengths(columns: Tensor) -> Tensor:
    """Lengths of rows, shape (..., 1, p); one where there is nothing."""
    found = torch.linalg.vector_norm(columns, dim=-1).unsqueeze(-2)
    return torch.where(found > 0, found, 1.0)


def _solved(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * identity, right)


def _fit(coefficients: Tensor, target: Tensor, rest: Tensor, columns: int) -> ResponseFit:
    size, dimension = float(target.square().sum()), target.shape[1]
    missing = float(rest.square().sum()) / size if size > 0 else 0.0
    freedom = max(dimension - columns, 1)
    unexplained = missing * size * dimension / freedom
    return ResponseFit(coefficients, 1.0 - missing, unexplained, freedom * len(target))
