"""A noise model of rows that share noise, fitted on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dd.noise.arguments import NUMBERED, _as_components, _as_matrix, _as_tensor
from dd.noise.centred import CentredInputs, native
from dd.noise.copies import count_copies
from dd.noise.units import Units
from dd.support.fingerprint import PROJECTIONS, whole_fingerprint

__all__ = ["UnitInputs", "unit_inputs"]

# Relative Gram matrices beyond this many numbers, 2 GB in single precision, are none to keep.
MOST_NUMBERS = 2**29
# Numbers of a block of units, in double precision.
_BLOCK = 2**22
# Rows of a component in one position that show their mean; units of unequal length leave fewer.
_FEWEST = 5


@dataclass(frozen=True, eq=False)
class UnitInputs:
    """Inputs by rows, and which rows are one unit.

    Attributes:
        values: all rows that carry noise, shape (N, d).
        where: their numbers among all rows, padding included, shape (N,); None for all.
        rows: as in :class:`dd.noise.units.Units`.
        components: of each row of ``values``, position in the unit included, shape (N,), or None.
        of_samples: component of each sample, or None.
        are_samples: as in :class:`dd.noise.units.Units`.
    """

    values: Tensor | np.ndarray
    where: Tensor | None
    rows: Tensor
    components: Tensor | None
    of_samples: Tensor | None
    are_samples: bool

    @classmethod
    def of_samples_with_rows(
        cls, inputs: Tensor | np.ndarray, components: Tensor | np.ndarray | None
    ) -> "UnitInputs":
        """Take inputs of shape (n, …, d) as n units of rows.

        Rows of nothing but zeros are padding: they push no weights, and have no shadow.

        Raises:
            ValueError: if the components are not n integers, or all rows are padding.
        """
        n, d = len(inputs), inputs.shape[-1]
        rows = inputs.reshape(-1, d)
        count = len(rows) // n
        there = _not_zero(rows)
        ids = None if components is None else _as_components(components, n)
        position = torch.arange(count).expand(n, count)
        # A common mean as well is one of each position.
        of_rows = (position if ids is None else ids.cpu().unsqueeze(1) * count + position).flatten()
        where = None if bool(there.all()) else there.nonzero().squeeze(1)
        if where is not None:
            if len(where) == 0:
                raise ValueError("NoiseModel: all inputs are zero")
            rows = rows[where] if isinstance(rows, Tensor) else rows[where.cpu().numpy()]
            of_rows = of_rows[where.cpu()]
        places = torch.arange(n * count).view(n, count)
        return cls(rows, where, places, _of_enough(of_rows, count), ids, are_samples=True)

    @classmethod
    def of_groups(
        cls,
        inputs: Tensor | np.ndarray,
        components: Tensor | np.ndarray | None,
        groups: Tensor | np.ndarray,
    ) -> "UnitInputs":
        """Take rows (N, d) of one group id as one unit.

        Raises:
            ValueError: if the ids are not N integers, or the largest group is too large for all.
        """
        ids = _as_tensor("groups", groups)
        if ids.shape != (len(inputs),) or ids.is_floating_point() or ids.is_complex():
            raise ValueError(
                f"NoiseModel: expected {len(inputs)} integer group ids, one a row of the inputs, "
                f"got shape {tuple(ids.shape)} of {ids.dtype}; {NUMBERED}"
            )
        unit = torch.unique(ids.cpu(), return_inverse=True)[1]
        sizes = torch.bincount(unit)
        order = unit.argsort(stable=True)
        place = torch.arange(len(unit)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        rows = torch.full((len(sizes), int(sizes.max())), -1)
        rows[unit[order], place] = order
        known = None if components is None else _as_components(components, len(inputs))
        return cls(inputs, None, rows, known, known, are_samples=False)

    def units(self, centred: CentredInputs) -> Units:
        """The units, with the Gram matrices of their rows around the component means.

        Raises:
            ValueError: if these take too much memory.
        """
        n, places = self.rows.shape
        if n * places**2 > MOST_NUMBERS:
            raise ValueError(
                f"NoiseModel: the Gram matrices of {n} units of {places} rows take "
                f"{4e-9 * n * places**2:.0f} GB; pool neighbouring rows before, or split units of "
                "many rows"
            )
        mean = float(centred.squared_norms().sum()) / centred.degrees
        gram = torch.zeros(n, places, places, dtype=centred.dtype, device=centred.device)
        for some, block, kept in self._blocks(centred):
            # The mean of n_a rows takes 1/n_a of each one's noise with it.
            block = block / kept.clamp_min(0.5).sqrt().unsqueeze(-1)
            gram[some] = (block @ block.mT / mean).to(gram)
        return Units(gram, self.rows.to(centred.device), self.are_samples)

    def _blocks(self, centred: CentredInputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some units after the other, z of their rows (u, P, d), and what means leave of each."""
        n, places = self.rows.shape
        length = max(1, _BLOCK // (places * centred.shape[1]))
        compact = self._compact.to(centred.device)
        sizes = centred.sizes.double()
        for start in range(0, n, length):
            rows = compact[start : start + length]
            there = rows >= 0
            index = rows.clamp_min(0).flatten()
            block = centred.rows(index).double()
            if centred.components is None:
                block, kept = block - centred.means, (1 - 1 / sizes).expand(len(index))
            else:
                ids = centred.components[index]
                block, kept = block - centred.means[ids], (1 - 1 / sizes)[ids]
            if centred.directions is not None:
                block = block - block @ centred.directions @ centred.directions.mT
            block = (block * there.view(-1, 1)).view(*rows.shape, -1)
            yield slice(start, start + length), block, kept.view(rows.shape)

    @cached_property
    def _compact(self) -> Tensor:
        """Number of each place's row among ``values``, -1 where there is none, shape (n, P)."""
        if self.where is None:
            return self.rows
        number = torch.full((self.rows.numel(),), -1)
        number[self.where.cpu()] = torch.arange(len(self.where))
        return number.view(self.rows.shape)

    def fingerprints(self, centred: CentredInputs) -> Tensor:
        """Of the samples, shape (n, 3)."""
        if not self.are_samples:
            return centred.fingerprints
        n, places = self.rows.shape
        found = centred.fingerprints
        if self.where is not None:
            of_all = found.new_zeros(n * places, PROJECTIONS)
            of_all[self.where.to(found.device)] = found
            found = of_all
        return whole_fingerprint(found.view(n, places, PROJECTIONS))

    def copies(self, centred: CentredInputs, fingerprints: Tensor) -> int:
        """How many units are copies of others, or nearly so; a group by its first row."""
        device = centred.device
        if not self.are_samples:
            first = self.rows[:, 0].to(device)
            return count_copies(centred.fingerprints[first], lambda i: centred.rows(first[i]))
        compact = self._compact.to(device)

        def flat(index: Tensor) -> Tensor:
            rows = compact[index]
            values = centred.rows(rows.clamp_min(0).flatten())
            return (values * (rows >= 0).view(-1, 1)).view(len(index), -1)

        return count_copies(fingerprints, flat)

    def independence(self, units: Units) -> float:
        """Share of the rows that would scatter as much if they were independent.

        Which is (tr C)²/tr C² over their number, C the correlation matrix of a unit's rows.
        """
        # The square of a single Gram matrix would hold that of its own noise.
        if self.are_samples:
            mean = units.gram.double().mean(0)
            share = float(mean.trace() ** 2 / mean.square().sum()) / len(mean)
        else:
            # Of the unit of a row: large ones hold most of the rows, and of their products.
            sizes = torch.bincount(units.unit).double()
            size = float(sizes.square().sum() / sizes.sum())
            share = 1 / (1 + max(size - 1, 0.0) * units.correlation**2)
        return min(1.0, share)


def _of_enough(components: Tensor, places: int) -> Tensor:
    """Components of positions, those of few rows joined within the sample's component."""
    few = torch.bincount(components)[components] < _FEWEST
    joined = components.max() + 1 + components // places
    return torch.unique(torch.where(few, joined, components), return_inverse=True)[1]


def _not_zero(rows: Tensor | np.ndarray) -> Tensor:
    if isinstance(rows, Tensor):
        return (rows != 0).any(1)
    length = max(1, _BLOCK // rows.shape[1])
    blocks = (rows[i : i + length] for i in range(0, len(rows), length))
    return torch.cat([torch.from_numpy(native(np.array(b)) != 0).any(1) for b in blocks])


def unit_inputs(
    inputs: Tensor | np.ndarray,
    components: Tensor | np.ndarray | None,
    groups: Tensor | np.ndarray | None,
) -> UnitInputs | None:
    """Inputs whose rows make units, or None where every row is a sample by itself.

    Raises:
        ValueError: if they are no numbers of shape (n, …, d), or both have several rows a sample
            and groups.
    """
    values = inputs if isinstance(inputs, np.ndarray) else _as_tensor("inputs", inputs)
    if values.ndim < 3:
        return (
            None if groups is None else UnitInputs.of_groups(_as_matrix(values), components, groups)
        )
    if groups is not None:
        raise ValueError(
            f"NoiseModel: inputs of shape {tuple(values.shape)} have several rows a sample, which "
            "are one unit already; groups= goes with inputs of shape (rows, d)"
        )
    if 0 in values.shape:
        raise ValueError(f"NoiseModel: inputs of shape {tuple(values.shape)} are empty")
    _as_matrix(values.reshape(len(values), -1))
    return UnitInputs.of_samples_with_rows(values, components)
