"""The decay of absent samples' shadows, applied when they appear again.

At every step the shadow and the momentum of a sample that is not in the batch go through one linear
map, the same for all such samples (equation (2)). A map of z = (Q_i, momentum), one a bin, is kept
for every step since the last time that all samples were brought up to date. A step costs O(batch):

- samples untouched since then share one product of maps, which every step extends by one factor;
- samples touched meanwhile go through the factors since;
- all samples are brought up to date whenever that costs no more than what the batches have cost
  since, or the maps would take more memory than the shadows.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DecayLog", "StepMap"]


@dataclass(frozen=True, eq=False)
class StepMap:
    """Where one step takes z, q quantities of k numbers each that lie side by side, p = q k.

    Attributes:
        first: rows of the map of the first quantity, the shadows, shape (B, k, p).
        others: rows of all other ones, shape (B, p - k, p); or None where there are none, or
            each of their units goes to the same unit of all quantities alone.
        factors: in that case one row a quantity, of what its units are multiplied by, shape
            (B, q - 1, p).
    """

    first: Tensor
    others: Tensor | None = None
    factors: Tensor | None = None

    @property
    def numbers(self) -> int:
        """How many a bin takes in memory."""
        parts = [part for part in (self.first, self.others, self.factors) if part is not None]
        return sum(part[0].numel() for part in parts)

    def of(self, rows: Tensor) -> Tensor:
        """Rows of z after the step, shape (B, u, p).

        Args:
            rows: before, of this shape.
        """
        units = self.first.shape[-2]
        moved = rows[..., :units] @ self.first
        if self.others is not None:
            return moved.baddbmm_(rows[..., units:], self.others)
        if self.factors is not None:
            parts = moved.unflatten(-1, (-1, units))
            factors = self.factors.unflatten(-1, (-1, units)).unsqueeze(-3)
            for at, part in enumerate(rows[..., units:].split(units, -1)):
                parts.addcmul_(part.unsqueeze(-2), factors[:, at])
        return moved

    def before(self, later: Tensor | None) -> Tensor:
        """This map and then another one, as matrices of shape (B, p, p).

        Args:
            later: the other one, or None for no other.
        """
        if later is None:
            width = self.first.shape[-1]
            later = torch.eye(width, dtype=self.first.dtype, device=self.first.device)
            later = later.expand(len(self.first), -1, -1)
        rows = [self.first @ later]
        if self.others is not None:
            rows.append(self.others @ later)
        if self.factors is not None:
            blocks = later.unflatten(-2, (-1, self.first.shape[-2]))
            factors = self.factors.unflatten(-1, (-1, self.first.shape[-2]))
            rows += [torch.einsum("btk,btkp->bkp", each, blocks) for each in factors.unbind(-3)]
        return torch.cat(rows, -2)


class DecayLog:
    """Maps that some samples have not gone through yet.

    Args:
        num_samples: n.
    """

    def __init__(self, num_samples: int) -> None:
        self._age = torch.zeros(num_samples, dtype=torch.long)
        self._maps: list[StepMap] = []
        self._common: Tensor | None = None
        self._work = 0

    @property
    def is_empty(self) -> bool:
        """Whether every sample is up to date."""
        return not self._maps

    def append(self, step: StepMap, present: Tensor) -> bool:
        """Take down the map of one step.

        Args:
            step: its map.
            present: samples that have gone through it, shape (u,), on the CPU.

        Returns:
            Whether the maps have grown as large as the shadows, so that :meth:`flush` is due.
        """
        self._maps.append(step)
        self._common = step.before(None) if self._common is None else step.of(self._common)
        self._age[present] = len(self._maps)
        self._work += len(present)
        return len(self._maps) * step.numbers >= len(self._age) * step.first.shape[-2]

    def grow(self, count: int) -> None:
        """Make room for more samples, whose shadows are zero."""
        self._age = torch.cat([self._age, self._age.new_zeros(count - len(self._age))])

    def due(self, rows: Tensor) -> Tensor:
        """Those of some samples that are not up to date, the longest absent first, on the CPU.

        Args:
            rows: shape (u,), on the CPU.
        """
        ages = self._age[rows]
        ordered, order = ages.sort(stable=True)
        return rows[order[: int(torch.searchsorted(ordered, len(self._maps)))]]

    def prefers_flush(self, rows: Tensor) -> bool:
        """Whether bringing all samples up to date is cheaper in the long run than these.

        Args:
            rows: samples about to be used, as :meth:`due` returns them.
        """
        ages = self._age[rows]
        links = int((len(self._maps) - ages)[ages > 0].sum())
        self._work += links
        if links == 0:
            return False
        products = len(self._maps) * self._maps[0].numbers // self._maps[0].first.shape[-1]
        return 2 * self._work > len(self._age) + products

    def catch_up(self, state: Tensor, rows: Tensor) -> Tensor:
        """Bring some samples up to date.

        Args:
            state: z of these samples, shape (B, u, p); is moved in place.
            rows: the samples, as :meth:`due` returns them.

        Returns:
            z up to date.
        """
        assert self._common is not None
        ages = self._age[rows].tolist()
        untouched = bisect_right(ages, 0)
        if untouched:
            state[:, :untouched] = state[:, :untouched] @ self._common
        for at in range(ages[untouched] if untouched < len(ages) else 0, len(self._maps)):
            some = slice(untouched, bisect_right(ages, at))
            if some.stop > untouched:
                state[:, some] = self._maps[at].of(state[:, some])
        self._age[rows] = len(self._maps)
        return state

    def flush(self, state: Tensor) -> Tensor:
        """Bring all samples up to date and forget the maps.

        Args:
            state: z, shape (B, n, p).

        Returns:
            z up to date, shape (B, n, p).
        """
        if not self._maps:
            return state
        assert self._common is not None
        order = self._age.argsort(stable=True)
        ages = self._age[order]
        bounds = torch.searchsorted(ages, torch.arange(len(self._maps) + 1)).tolist()
        order = order.to(state.device)
        rest: Tensor | None = None
        for at in range(len(self._maps) - 1, 0, -1):
            rest = self._maps[at].before(rest)
            some = order[bounds[at] : bounds[at + 1]]
            if len(some) > 0:
                state[:, some] = state[:, some] @ rest
        some = order[: bounds[1]]
        state[:, some] = state[:, some] @ self._common
        self._maps, self._common, self._work = [], None, 0
        self._age.zero_()
        return state
