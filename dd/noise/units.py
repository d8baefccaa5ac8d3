"""Units: rows of the inputs that share noise, and are left out together."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dd.functional.units import gathered_by_unit, mixed, scattered_to_units

__all__ = ["Units"]


@dataclass(frozen=True, eq=False)
class Units:
    """The rows of every unit, and how their noise goes together.

    Attributes:
        gram: z_aᵀz_b of a unit's rows over the mean of ‖z‖² of all rows, shape (n, P, P); zero
            where a unit has no such row, or one of nothing but zeros.
        rows: which row stands in each place, shape (n, P); -1 where a unit has fewer rows.
        are_samples: whether a sample is a unit, with its rows in their order, as inputs of shape
            (n, P, d) are; else a sample is a row, and units are groups of them.
    """

    gram: Tensor
    rows: Tensor
    are_samples: bool

    def __len__(self) -> int:
        """Number of units, n."""
        return len(self.rows)

    @property
    def places(self) -> int:
        """Rows that a unit has at most, P."""
        return self.rows.shape[1]

    @property
    def count(self) -> int:
        """Number of rows, those of padding included."""
        return len(self.unit)

    @property
    def unit(self) -> Tensor:
        """Unit of every row, shape (rows,)."""
        return self._where[0]

    @property
    def place(self) -> Tensor:
        """Place of every row in its unit, shape (rows,)."""
        return self._where[1]

    @cached_property
    def _where(self) -> tuple[Tensor, Tensor]:
        unit, place = (self.rows >= 0).nonzero(as_tuple=True)
        order = self.rows[unit, place].argsort()
        return unit[order], place[order]

    @cached_property
    def mass(self) -> Tensor:
        """‖z‖² of every row over its mean, shape (rows,)."""
        return self.gram[self.unit, self.place, self.place]

    @property
    def has_noise(self) -> Tensor:
        """Whether a row is more than padding, shape (rows,)."""
        return self.mass > 0

    @cached_property
    def effective_rows(self) -> float:
        """How many independent rows push as much: N² over the sum of all relative Gram matrices.

        All N rows where those of a unit are independent, the units where they are copies.
        """
        total = float(self.has_noise.sum())
        return total**2 / max(float(self.gram.double().sum()), total)

    @cached_property
    def correlation(self) -> float:
        """Mean of z_aᵀz_b over the mean of ‖z‖², rows a and b ≠ a of one unit."""
        own = torch.diagonal(self.gram, dim1=-2, dim2=-1)
        there = (own > 0).double()
        pairs = float((there.sum(1).square() - there.sum(1)).sum())
        between = float(self.gram.double().sum() - own.double().sum())
        return between / pairs if pairs > 0 else 0.0

    def weighted(self, values: Tensor, index: Tensor | None) -> Tensor:
        """Σ_b T_ab v_b over the rows of a batch, at its rows.

        Args:
            values: v, shape (m, k).
            index: row of each, shape (m,); None for all in their order.

        Returns:
            Shape (m, k).
        """
        if index is None and self.are_samples:
            return self._mixed(values)
        touched, unit, place = self._touched(index)
        shape = torch.Size([len(touched), self.places])
        moved = mixed(scattered_to_units(values, unit, place, shape), self.gram[touched])
        return gathered_by_unit(moved, unit, place)

    def spread(self, values: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ_b T_ab v_b over the rows of a batch, at every row of their units, there or not.

        Args:
            values: v, shape (m, k).
            index: row of each, shape (m,); None for all in their order.

        Returns:
            These rows in ascending order, shape (w,), and the sums, shape (w, k).
        """
        if index is None and self.are_samples:
            return torch.arange(self.count, device=values.device), self._mixed(values)
        touched, unit, place = self._touched(index)
        shape = torch.Size([len(touched), self.places])
        moved = mixed(scattered_to_units(values, unit, place, shape), self.gram[touched])
        rows = self.rows[touched]
        there = rows >= 0
        found, order = rows[there].sort()
        return found, moved[there][order]

    def summed(self, values: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ_b v_b over the rows of a batch, at every row of their units; as :meth:`spread`."""
        touched, unit, _ = self._touched(index)
        total = values.new_zeros(len(touched), values.shape[1]).index_add_(0, unit, values)
        rows = self.rows[touched]
        there = rows >= 0
        found, order = rows[there].sort()
        of_row = torch.arange(len(touched), device=rows.device).unsqueeze(1).expand_as(rows)
        return found, total[of_row[there][order]]

    def of(self, samples: Tensor) -> "Units":
        """The same with some samples alone, which must be units.

        Raises:
            ValueError: if they are rows.
        """
        if not self.are_samples:
            raise ValueError(
                "NoiseModel: a part of samples that are rows of groups cannot be taken; fit "
                "another model on these rows with their groups"
            )
        samples = samples.to(self.rows.device)
        rows = torch.arange(len(samples) * self.places, device=self.rows.device)
        gram = self.gram[samples.to(self.gram.device)]
        return replace(self, gram=gram, rows=rows.view(-1, self.places))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Units":
        """The same on a device, Gram matrices in ``dtype``."""
        if (self.gram.device, self.gram.dtype, self.rows.device) == (device, dtype, device):
            return self
        return replace(self, gram=self.gram.to(device, dtype), rows=self.rows.to(device))

    def __str__(self) -> str:
        """Number of units, rows of each, and how they correlate."""
        rows = self.count / len(self)
        return f"{len(self)} units of {rows:.3g} rows that correlate by {self.correlation:.2f}"

    def _mixed(self, values: Tensor) -> Tensor:
        return mixed(values.view(len(self), self.places, -1), self.gram).flatten(0, 1)

    def _touched(self, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Units of some rows, which of these each row is of, and its place there."""
        unit, place = self.unit, self.place
        if index is not None:
            unit, place = unit[index], place[index]
        touched, which = torch.unique(unit, return_inverse=True)
        return touched, which, place
