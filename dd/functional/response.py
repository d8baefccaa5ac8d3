"""How an optimizer's update answers to the gradients, found from the update that it made.

Section 11 of ``docs/theory.md``. Weights and what moves them are laid out as
:class:`torch.nn.Linear` stores them: one row a unit, shape (k, d).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "NoiseBins",
    "ResponseFit",
    "UnitProducts",
    "coefficients_by_bin",
    "combined",
    "fit_across_units",
    "fit_by_unit",
    "fit_of_all_units",
]

# Rows of the basis beyond this share of the coordinates leave no freedom to tell a fit by.
_MOST_COLUMNS = 0.9
# Products of d numbers are summed to a few units in the last place.
_ROUNDINGS = 16


class UnitProducts:
    """Quantities and their inner products unit by unit, from which any of them is fitted by others.

    Args:
        quantities: by their names, each of shape (k, d).

    Attributes:
        gram: their products, shape (k, q, q).
    """

    def __init__(self, quantities: Mapping[str, Tensor]) -> None:
        self._names = list(quantities)
        self._all = torch.stack(list(quantities.values()), 1).double()
        self._along: tuple[Tensor, Tensor] | None = None
        self.gram = self._all @ self._all.mT

    def joined(self, quantities: Mapping[str, Tensor]) -> "UnitProducts":
        """With more quantities."""
        if not quantities:
            return self
        known = dict(zip(self._names, self.columns.unbind(1), strict=True))
        return UnitProducts(known | dict(quantities))

    def without(self, directions: Tensor | None) -> "UnitProducts":
        """Without some orthonormal directions, shape (d, m), of the inputs' space."""
        if directions is None:
            return self
        found = copy.copy(self)
        basis = directions.to(self._all)
        along = self._all @ basis
        found._along, found.gram = (along, basis), self.gram - along @ along.mT
        vars(found).pop("columns", None)
        return found

    @cached_property
    def columns(self) -> Tensor:
        """All quantities, in float64, shape (k, q, d)."""
        if self._along is None:
            return self._all
        along, basis = self._along
        return self._all - along @ basis.mT

    def within(self, directions: Tensor) -> Tensor:
        """Products within the span of orthonormal directions, shape (d, r); shape (k, q, q)."""
        along = (self.columns.to(directions) @ directions).double()
        return along @ along.mT

    @property
    def shape(self) -> tuple[int, int]:
        """The units k and inputs d."""
        return self._all.shape[0], self._all.shape[2]

    def positions(self, names: Sequence[str]) -> list[int]:
        """Where some of the quantities stand."""
        return [self._names.index(name) for name in names]

    def of(self, one: str, other: str) -> Tensor:
        """Products of two quantities, shape (k,)."""
        (i, j) = self.positions([one, other])
        return self.gram[:, i, j]

    def left(self, update: str, basis: Sequence[str], coefficients: Tensor) -> float:
        """Squared size of what a combination leaves of a quantity, to all digits.

        Args:
            update: the quantity.
            basis: what is combined.
            coefficients: as in :class:`ResponseFit`.
        """
        columns = self.columns[:, self.positions(basis)].transpose(0, 1)
        if coefficients.dim() == 3:
            found = torch.einsum("plj,pld->jd", coefficients, columns)
        else:
            found = (coefficients.unsqueeze(-1) * columns).sum(0)
        (at,) = self.positions([update])
        return float((self.columns[:, at] - found).square().sum())


@dataclass(frozen=True, eq=False)
class ResponseFit:
    """An update as a combination of known quantities.

    Attributes:
        coefficients: one a quantity and unit, shape (p, k); or, across units, shape (p, k, k): what
            unit l of the quantity adds to unit j of the update stands at [., l, j].
        share: of the update's squared size that the combination explains, all units together.
        unexplained: squared size of the rest, per degree of freedom that the fit leaves, times the
            number of coordinates.
        rounding: by what rounding may have changed the squared size of the rest.
        freedom: degrees of freedom that the fit leaves, all units together.
    """

    coefficients: Tensor
    share: float
    unexplained: float
    rounding: float
    freedom: int

    @property
    def is_across_units(self) -> bool:
        """Whether units are combined with each other."""
        return self.coefficients.dim() == 3


def fit_by_unit(
    products: UnitProducts, update: str, basis: Sequence[str], ridge: float
) -> ResponseFit | None:
    """Combine each unit's update of the same unit of every quantity, by least squares.

    Args:
        products: of all that is named.
        update: what is combined.
        basis: p quantities.
        ridge: penalty on coefficients of quantities of unit length.

    Returns:
        The fit, in float64; None where d coordinates do not tell p quantities apart.
    """
    return _fit_by_unit(products, update, basis, ridge, pooled=False)


def fit_of_all_units(
    products: UnitProducts, update: str, basis: Sequence[str], ridge: float
) -> ResponseFit | None:
    """Combine the update of all units by one coefficient a quantity, by least squares.

    Args:
        products: of all that is named.
        update: what is combined.
        basis: p quantities.
        ridge: as in :func:`fit_by_unit`.

    Returns:
        The fit, in float64, its coefficients repeated for every unit; None where k d numbers do not
        tell p quantities apart.
    """
    fit = _fit_by_unit(products, update, basis, ridge, pooled=True)
    if fit is None:
        return None
    return replace(fit, coefficients=fit.coefficients.expand(-1, products.shape[0]))


def fit_across_units(
    products: UnitProducts, update: str, basis: Sequence[str], ridge: float
) -> ResponseFit | None:
    """Combine every unit's update of all units of every quantity, by least squares.

    Args:
        products: of all that is named.
        update: what is combined.
        basis: p quantities.
        ridge: as in :func:`fit_by_unit`.

    Returns:
        The fit, in float64; None where d coordinates do not tell p k columns apart.
    """
    count, (width, dimension) = len(basis), products.shape
    if count * width > _MOST_COLUMNS * dimension:
        return None
    (at,) = products.positions([update])
    target = products.columns[:, at]
    columns = products.columns[:, products.positions(basis)].transpose(0, 1).flatten(0, 1)
    size = products.gram[:, at, at]
    solution = _solved(columns @ columns.mT, columns @ target.mT, size, ridge)
    return _summary(solution, count * width, dimension, lambda c: c.unflatten(0, (count, width)))


@dataclass(frozen=True, eq=False)
class NoiseBins:
    """Bins of the noise, with the directions of the leading ones.

    Attributes:
        directions: orthonormal, bin after bin, shape (d, r).
        ends: of each of these bins, in this order.
        count: B of all bins.
    """

    directions: Tensor
    ends: Sequence[int]
    count: int


def coefficients_by_bin(
    products: UnitProducts, update: str, basis: Sequence[str], fit: ResponseFit, bins: NoiseBins
) -> Tensor:
    """A fit's coefficients for the directions of each bin alone, where these tell them.

    In a bin of d_b directions the fit leaves a rest, which is fitted in turn, with p/d_b for the
    ridge: d_b numbers tell p coefficients to that share of the update's size.

    Args:
        products: as in :func:`fit_by_unit`.
        update: likewise.
        basis: likewise.
        fit: of one coefficient a quantity and unit.
        bins: the last ones, whose directions are not known, are taken together.

    Returns:
        Shape (p, B, k).
    """
    rows, (at,) = products.positions(basis), products.positions([update])
    start = fit.coefficients.mT.unsqueeze(-1)
    rest, left = products.gram, products.shape[1]
    found, begin = [], 0
    for end in bins.ends:
        inside = products.within(bins.directions[:, begin:end])
        found.append(_refined(inside, rows, at, start, len(rows) / (end - begin)))
        rest, left, begin = rest - inside, left - (end - begin), end
    last = _refined(rest, rows, at, start, len(rows) / max(left, 1))
    return torch.stack(found + [last] * (bins.count - len(found)), 1)


def _refined(gram: Tensor, rows: list[int], at: int, start: Tensor, ridge: float) -> Tensor:
    basis = gram[:, rows][:, :, rows]
    right = gram[:, rows, at].unsqueeze(-1) - basis @ start
    found = _solved(basis, right, gram[:, at, at], ridge).coefficients
    return (start + found).squeeze(-1).mT


def combined(parts: Sequence[Tensor], coefficients: Tensor, start: Tensor | None = None) -> Tensor:
    """S + Σ_b B_b A_b of the shadows of some quantities.

    Args:
        parts: p shadows, each of shape (B, n, k).
        coefficients: as in :class:`ResponseFit`, or one a quantity, bin and unit, shape
            (p, B, 1, k).
        start: S, of the same shape, or None for zero.

    Returns:
        Shape (B, n, k).
    """
    found, is_own = start, False
    for part, coefficient in zip(parts, coefficients.to(parts[0]), strict=True):
        found = _with_term(found, part, coefficient, in_place=is_own)
        is_own = True
    assert found is not None
    return found


def _with_term(
    found: Tensor | None, part: Tensor, coefficient: Tensor, *, in_place: bool
) -> Tensor:
    """One term more of a sum, with no intermediate result of its size."""
    if coefficient.dim() != 2:
        if found is None:
            return part * coefficient
        if in_place:
            return found.addcmul_(part, coefficient)
        return torch.addcmul(found, part, coefficient)
    if found is None:
        return part @ coefficient
    matrices = coefficient.expand(len(part), -1, -1)
    if in_place:
        return found.baddbmm_(part, matrices)
    return torch.baddbmm(found, part, matrices)


def _fit_by_unit(
    products: UnitProducts, update: str, basis: Sequence[str], ridge: float, *, pooled: bool
) -> ResponseFit | None:
    width, dimension = products.shape
    gram = products.gram
    if pooled:
        gram, dimension = gram.sum(0, keepdim=True), dimension * width
    if len(basis) > _MOST_COLUMNS * dimension:
        return None
    rows, (at,) = products.positions(basis), products.positions([update])
    basis_gram = gram[:, rows][:, :, rows]
    right = gram[:, rows, at].unsqueeze(-1)
    solution = _solved(basis_gram, right, gram[:, at, at], ridge)
    return _summary(solution, len(basis), dimension, lambda c: c.squeeze(-1).mT)


@dataclass(frozen=True, eq=False)
class _Solution:
    """Least squares from products alone.

    Attributes:
        coefficients: shape (..., p, m).
        size: of the targets, squared.
        rest: squared size of what is left.
        rounding: error of that.
        targets: how many.
    """

    coefficients: Tensor
    size: float
    rest: float
    rounding: float
    targets: int


def _solved(gram: Tensor, right: Tensor, size: Tensor, ridge: float) -> _Solution:
    """Combine columns of products ``gram`` to targets of products ``right`` with them."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0).unsqueeze(-1)
    scaled = gram / (lengths * lengths.mT)
    target = right / lengths
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(scaled + ridge * identity, target)
    total = size.sum()
    rest = total + (found * (scaled @ found - 2 * target)).sum()
    terms = total + (found.abs() * (scaled.abs() @ found.abs())).sum()
    total, rest, terms = torch.stack([total, rest, terms]).tolist()
    rounding = _ROUNDINGS * torch.finfo(gram.dtype).eps * terms
    return _Solution(found / lengths, total, max(rest, 0.0), rounding, size.numel())


def _summary(
    found: _Solution, columns: int, dimension: int, arranged: Callable[[Tensor], Tensor]
) -> ResponseFit:
    missing = found.rest / found.size if found.size > 0 else 0.0
    freedom = max(dimension - columns, 1)
    scale = dimension / freedom
    return ResponseFit(
        arranged(found.coefficients),
        1.0 - missing,
        found.rest * scale,
        found.rounding * scale,
        freedom * found.targets,
    )
