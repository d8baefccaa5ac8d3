"""Training samples that may have several rows each."""

import torch
from torch import Tensor

from dd.noise.units import Units
from dd.samples.placement import Placement
from dd.samples.recognition import Samples
from dd.support.fingerprint import PROJECTIONS, whole_fingerprint

__all__ = ["SamplesOfRows", "spread_over_units"]


class SamplesOfRows(Samples):
    """Samples of one row, or of several, which are known by all of them together.

    Attributes:
        rows_each: rows of a sample, or None before the first batch.
    """

    rows_each: int | None = None
    _latest: tuple[Placement, Placement] | None = None

    @property
    def row_count(self) -> int | None:
        """Number of rows of all training samples, or None before it is known."""
        return None if self.count is None else self.count * (self.rows_each or 1)

    def forget(self) -> None:
        """Take the next batch as new."""
        super().forget()
        self.rows_each, self._latest = None, None

    def require_rows(self, inputs: Tensor) -> None:
        """Check that samples have as many rows as before.

        Args:
            inputs: of a batch, shape (m, d) or (m, P, d).

        Raises:
            ValueError: if they have not.
        """
        rows = inputs.shape[1] if inputs.dim() == 3 else 1
        if self.rows_each not in {None, rows}:
            raise ValueError(
                f"DecoupledDescent: a training batch has samples of {rows} rows at the decoupled "
                f"layer, those before had {self.rows_each}; fill up each sample with rows of zeros "
                "to one number, and leave these out of what is pooled"
            )
        self.rows_each = rows

    def rows_of(self, placement: Placement, inputs: Tensor) -> Placement:
        """Where the rows of a batch stand among all rows.

        Args:
            placement: of its samples.
            inputs: shape (m, d) or (m, P, d).
        """
        if inputs.dim() == 2:
            return placement
        if self._latest is not None and self._latest[0] is placement:
            return self._latest[1]
        each = inputs.shape[1]
        # Not what was last projected, which may have been another batch.
        rows = super().fingerprints(inputs.flatten(0, 1))
        if placement.index is None:
            found = Placement(rows)
        else:
            assert self.known is not None
            found = Placement.of(rows, _expanded(placement.index, each), len(self.known) * each)
        self._latest = placement, found
        return found

    def fingerprints(self, inputs: Tensor) -> Tensor:
        """What samples of shape (m, d) or (m, P, d) are known again by, shape (m, 3)."""
        if inputs.dim() == 2:
            return super().fingerprints(inputs)
        rows = super().fingerprints(inputs.flatten(0, 1))
        return whole_fingerprint(rows.view(len(inputs), -1, PROJECTIONS))


def _expanded(index: Tensor, each: int) -> Tensor:
    """Numbers of the rows of samples, shape (m · P,)."""
    return (index.unsqueeze(1) * each + torch.arange(each, device=index.device)).flatten()


def spread_over_units(
    units: Units, placement: Placement, gradient: Tensor
) -> tuple[Placement, Tensor]:
    """The rows that a step pushes: all of the units that are in the batch.

    Args:
        units: which rows these are.
        placement: of the batch's rows.
        gradient: G, one row a distinct one of the batch's, shape (u, k).

    Returns:
        The placement of all rows pushed, and Σ_b T_ab g_b of each, shape (w, k).
    """
    rows, moved = units.spread(gradient, placement.rows)
    return Placement.of(placement.fingerprints[:0], rows, units.count), moved
