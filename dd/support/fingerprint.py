"""Three random projections of every sample, by which it is known again."""

import torch
from torch import Tensor

__all__ = ["PROJECTIONS", "Fingerprints", "directions", "fingerprint", "whole_fingerprint"]

PROJECTIONS = 3

# Summing in another order moves a projection by a few float32 roundings of its size. A sample that
# is looked up among all may differ by no more: where one input is far larger than the others, those
# tell samples apart by little.
_ROUNDING_TOLERANCE = 1e-5
# A sample compared with itself may also have been computed anew in half precision.
_SPREAD_TOLERANCE = 1e-3

# Pairs of a sample and a candidate that are compared at a time.
_AT_A_TIME = 2**22


def directions(dimension: int) -> Tensor:
    """The directions of every fingerprint of this dimension, shape (3, d)."""
    generator = torch.Generator().manual_seed(0)
    # Not in the default dtype, which training loops change.
    return torch.randn(PROJECTIONS, dimension, generator=generator, dtype=torch.float32)


def fingerprint(inputs: Tensor, along: Tensor | None = None) -> Tensor:
    """Project every sample on the directions.

    Args:
        inputs: shape (n, d).
        along: :func:`directions`, if at hand, in the inputs' dtype and on their device.

    Returns:
        Shape (n, 3), in float32 at least.
    """
    values = inputs.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    along = directions(values.shape[1]).to(values) if along is None else along
    # A matrix product would be rounded to TensorFloat32 where the user allows that.
    return torch.stack([values @ direction for direction in along], 1)


def whole_fingerprint(rows: Tensor) -> Tensor:
    """The fingerprints of samples of several rows, in their order.

    Args:
        rows: fingerprints of the rows, shape (n, P, 3).

    Returns:
        Shape (n, 3).
    """
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(rows.shape[1], generator=generator, dtype=torch.float32).to(rows)
    # A matrix product would be rounded to TensorFloat32 where the user allows that.
    return (rows * weights.unsqueeze(1)).sum(1)


class Fingerprints:
    """Fingerprints of the training samples, not a number where a sample was not yet seen.

    Args:
        values: shape (n, 3).
        rounding: by which fingerprints of one sample differ, over their size; by default that of
            sums in another order.
    """

    def __init__(self, values: Tensor, rounding: float | None = None) -> None:
        self.values = values
        self._relative = _ROUNDING_TOLERANCE if rounding is None else rounding
        self._known = 0
        self._rounding = self._tolerance = values.new_zeros(PROJECTIONS)
        self._order: tuple[Tensor, Tensor] | None = None
        self._has_copies: bool | None = None
        self._measure()
        self._fresh = [self.seen]

    def __len__(self) -> int:
        """Number of samples, seen or not."""
        return len(self.values)

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._known

    @property
    def seen(self) -> Tensor:
        """Fingerprints of the samples seen, shape (s, 3)."""
        return self.values[~self.values[:, 0].isnan()]

    @property
    def complete(self) -> bool:
        """Whether every sample was seen."""
        return self._known == len(self.values)

    def grow(self, count: int) -> None:
        """Make room for more samples."""
        missing = self.values.new_full((count - len(self.values), PROJECTIONS), torch.nan)
        self.values = torch.cat([self.values, missing])

    def put(self, index: Tensor, found: Tensor) -> None:
        """Take down samples that were not seen before.

        Args:
            index: shape (m,).
            found: their fingerprints, shape (m, 3).
        """
        self.values[index] = found
        self._fresh.append(found)
        self._order = self._has_copies = None
        before, self._known = self._known, self._known + len(index)
        # Tolerances follow the samples' scale, which few doublings tell.
        if before == 0 or self._known.bit_length() > before.bit_length() or self.complete:
            self._measure()

    def take_fresh(self) -> Tensor:
        """Fingerprints that came since the last call, shape (f, 3)."""
        fresh = torch.cat(self._fresh)
        self._fresh = [fresh[:0]]
        return fresh

    def differ(self, index: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Compare samples with what is known of them.

        Args:
            index: shape (m,).
            found: fingerprints, shape (m, 3).

        Returns:
            Which of them are new and which differ, each of shape (m,).
        """
        known = self.values[index].to(found)
        new = known[:, 0].isnan()
        return new, ~(((known - found).abs() <= self._tolerance.to(found)).all(1) | new)

    def equal(self, found: Tensor) -> Tensor:
        """Which rows of a batch of all samples in their order are theirs, shape (n,)."""
        close = (self.values.to(found) - found).abs() <= self._tolerance.to(found)
        return close.all(1)

    @property
    def has_copies(self) -> bool:
        """Whether some known samples are the same."""
        if self._has_copies is None:
            ordered = self.values[self._sorted()[1]]
            # Next to each other in the order of the first projection, but for rounding.
            near = [
                bool(((ordered[lag:] - ordered[:-lag]).abs() <= self._rounding).all(1).any())
                for lag in (1, 2)
            ]
            self._has_copies = any(near)
        return self._has_copies

    def are_at(self, start: int, found: Tensor) -> bool:
        """Whether samples are the known ones from a row on, shape (m, 3)."""
        known = self.values[start : start + len(found)].to(found)
        if len(known) != len(found):
            return False
        return bool(((known - found).abs() <= self._rounding.to(found)).all())

    def find(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Look samples up.

        Args:
            found: fingerprints, shape (m, 3).

        Returns:
            The index of the nearest known sample, and whether it is the same one, each of shape
            (m,).
        """
        first, order = self._sorted()
        if len(order) == 0:
            nowhere = torch.zeros(len(found), dtype=torch.long, device=found.device)
            return nowhere, nowhere.bool()
        tolerance = self._rounding.to(first)
        found = found.to(first)
        key = found[:, 0].contiguous()
        low = torch.searchsorted(first, key - tolerance[0])
        high = torch.searchsorted(first, key + tolerance[0], right=True)
        width = max(1, int((high - low).max()))
        rows = max(1, _AT_A_TIME // width)
        blocks = zip(found.split(rows), low.split(rows), high.split(rows), strict=True)
        parts = [self._nearest(*block, width, order, tolerance) for block in blocks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _nearest(
        self, found: Tensor, low: Tensor, high: Tensor, width: int, order: Tensor, tolerance: Tensor
    ) -> tuple[Tensor, Tensor]:
        position = low.unsqueeze(1) + torch.arange(width, device=low.device)
        candidate = order[position.clamp_max(len(order) - 1)]
        apart = (self.values[candidate] - found.unsqueeze(1)).abs() / tolerance
        distance = apart.amax(-1).masked_fill(position >= high.unsqueeze(1), torch.inf)
        # The distance of what is not a number stays one.
        nearest, which = distance.nan_to_num(nan=torch.inf).min(1)
        return candidate.gather(1, which.unsqueeze(1)).squeeze(1), nearest <= 1

    def _sorted(self) -> tuple[Tensor, Tensor]:
        if self._order is None:
            seen = (~self.values[:, 0].isnan()).nonzero().squeeze(1)
            # Stable, so that of several copies the first is found.
            values, order = self.values[seen, 0].sort(stable=True)
            self._order = values.contiguous(), seen[order]
        return self._order

    def _measure(self) -> None:
        known = self.seen
        self._known = len(known)
        if len(known) > 0:
            size = known.square().mean(0).sqrt().clamp_min(torch.finfo(known.dtype).tiny)
            self._rounding = self._relative * size
            spread = known.std(0, correction=0)
            self._tolerance = _SPREAD_TOLERANCE * spread + self._rounding
