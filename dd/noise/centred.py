"""Inputs around their component means, a few rows or columns at a time."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dd.functional import at_least_single, component_sums
from dd.noise.copies import count_copies
from dd.support.fingerprint import PROJECTIONS, fingerprint

__all__ = ["CentredInputs", "native"]

# Numbers of a block in double precision: in cache where that leaves products of enough rows, and
# never more than 128 MB.
_CACHED, _ROWS, _MOST = 2**18, 1024, 2**24


class CentredInputs:
    """Inputs z_i = x_i − μ_{a(i)}, read in blocks and never copied as a whole.

    So that inputs may lie in a file that is mapped into memory and larger than it.

    Args:
        source: X, shape (n, d), of real numbers; single precision at least is worked in.
        components: ids from 0, shape (n,), or None for one component.

    Attributes:
        source: X.
        components: ids, shape (n,), or None.
        means: μ, shape (C, d), float64.
        fingerprints: shape (n, 3).
        directions: orthonormal, shape (d, m), float64; what lies along them is taken out. None
            until :meth:`separate`.
        power: mean of ‖x_i‖² over d.
        independence: share of the degrees of freedom that independent samples would need to scatter
            as much.
        largest: of all |x_ij|.

    Raises:
        ValueError: if a number is not finite.
    """

    def __init__(self, source: Tensor | np.ndarray, components: Tensor | None) -> None:
        self.source, self.independence = source, 1.0
        self.directions: Tensor | None = None
        self._along: Tensor | None = None
        n, d = source.shape
        like = self._single(slice(0, 1))
        self.dtype, self.device = like.dtype, like.device
        self.components = None if components is None else components.to(self.device)
        count = 1 if components is None else int(components.max()) + 1
        sums = torch.zeros(count, d, dtype=torch.float64, device=self.device)
        # Results are put where they belong: kept between the blocks, they would keep their memory
        # from being used again.
        self.fingerprints = like.new_empty(n, PROJECTIONS)
        power, self.largest = 0.0, 0.0
        for rows in self._blocks(n, d):
            block = self._single(rows)
            if not bool(block.isfinite().all()):
                raise ValueError("NoiseModel: the inputs contain NaN or infinity; clean them first")
            self.fingerprints[rows] = fingerprint(block)
            self.largest = max(self.largest, float(block.abs().max()))
            # The squares of single precision leave its range long before the inputs do.
            block = block.double()
            power += float(block.square().sum())
            sums += self._sums(block, rows, count)
        self.means = sums / self.sizes.clamp_min(1).unsqueeze(1)
        self.power = power / (n * d)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        n, d = self.source.shape
        return n, d

    @property
    def sizes(self) -> Tensor:
        """Number of samples of each component, shape (C,)."""
        if self.components is None:
            return torch.tensor([len(self.source)], device=self.device)
        return torch.bincount(self.components)

    @property
    def degrees(self) -> int:
        """Degrees of freedom, n less the number of components."""
        return len(self.source) - len(self.sizes)

    @property
    def effective_degrees(self) -> int:
        """Degrees of freedom of independent samples that scatter as much."""
        return max(2, round(self.degrees * self.independence))

    @property
    def dimension(self) -> int:
        """Input dimension d, less the directions taken out."""
        return self.shape[1] - (0 if self.directions is None else self.directions.shape[1])

    @cached_property
    def copies(self) -> int:
        """How many samples are copies of others, or nearly so."""
        return count_copies(self.fingerprints, self.rows)

    def rows(self, index: Tensor) -> Tensor:
        """Some x, not centred, shape (m, d), by their indices, shape (m,)."""
        if isinstance(self.source, Tensor):
            return self._single(index)
        return at_least_single(torch.from_numpy(native(self.source[index.cpu().numpy()])))

    def separate(self, directions: Tensor) -> None:
        """Take out what lies along orthonormal directions, shape (d, m)."""
        directions = directions.double()
        along = directions.new_empty(len(self.source), directions.shape[1])
        for rows, block in self.row_blocks():
            along[rows] = block @ directions
        self.directions, self._along = directions, along

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some samples after the other, and their z, shape (m, d), float64."""
        n, d = self.shape
        for rows in self._blocks(n, d):
            yield rows, self._less(self._single(rows).double(), rows, slice(None))

    def column_blocks(self) -> Iterator[Tensor]:
        """Yield some coordinates of all z after the other, shape (n, c), float64."""
        n, d = self.shape
        for columns in self._blocks(d, n):
            block = self._at((slice(None), columns)).to(self.dtype).double()
            yield self._less(block, slice(None), columns)

    def squared_norms(self) -> Tensor:
        """‖z_i‖², shape (n,), float64."""
        norms = self.means.new_empty(len(self.source))
        for rows, block in self.row_blocks():
            norms[rows] = block.square().sum(1)
        return norms

    def _less(self, block: Tensor, rows: slice, columns: slice) -> Tensor:
        means = self.means[:, columns]
        if self.components is not None:
            means = means.index_select(0, self.components[rows])
        # Not in place: the block may be a view of the source.
        block = block - means
        if self.directions is not None and self._along is not None:
            block.addmm_(self._along[rows], self.directions[columns].mT, alpha=-1)
        return block

    def _sums(self, block: Tensor, rows: slice, count: int) -> Tensor:
        if self.components is None:
            return block.sum(0, keepdim=True)
        return component_sums(block, self.components[rows], count)

    def _single(self, rows: slice | Tensor) -> Tensor:
        return at_least_single(self._at(rows))

    def _at(self, where: slice | Tensor | tuple[slice, slice]) -> Tensor:
        if isinstance(self.source, Tensor):
            return self.source[where].detach()
        # A copy, as torch warns of arrays that are not to be written to.
        return torch.from_numpy(native(np.array(self.source[where])))

    def _blocks(self, count: int, width: int) -> Iterator[slice]:
        length = max(1, _CACHED // width, min(_ROWS, _MOST // width))
        return (slice(start, start + length) for start in range(0, count, length))


def native(array: np.ndarray) -> np.ndarray:
    """Return an array in a byte order, precision and layout that torch takes."""
    kind = array.dtype.newbyteorder("=")
    if kind.kind == "f" and kind.itemsize > 8:
        kind = np.dtype(np.float64)
    # Negative strides are none of torch's.
    return np.ascontiguousarray(array, dtype=kind)
