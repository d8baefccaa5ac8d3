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

import torch
from torch import Tensor

__all__ = ["DecayLog"]


class DecayLog:
    """Maps that some samples have not gone through yet.

    Args:
        num_samples: n.
    """

    def __init__(self, num_samples: int) -> None:
        self._age = torch.zeros(num_samples, dtype=torch.long)
        self._maps: list[Tensor] = []
        self._common: Tensor | None = None
        self._work = 0

    @property
    def is_empty(self) -> bool:
        """Whether every sample is up to date."""
        return not self._maps

    def append(self, step: Tensor, present: Tensor, width: int) -> bool:
        """Take down the map of one step.

        Args:
            step: rows z go to z @ step, shape (B, p, p).
            present: samples that have gone through it, shape (u,), on the CPU.
            width: k, with p = k, or p = 2k under momentum.

        Returns:
            Whether the maps have grown as large as the shadows, so that :meth:`flush` is due.
        """
        self._maps.append(step)
        self._common = step if self._common is None else self._common @ step
        self._age[present] = len(self._maps)
        self._work += len(present)
        return len(self._maps) * step.shape[-1] ** 2 >= len(self._age) * width

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
        return 2 * self._work > len(self._age) + len(self._maps) * self._maps[0].shape[-1]

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
                state[:, some] = state[:, some] @ self._maps[at]
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
            rest = self._maps[at] if rest is None else self._maps[at] @ rest
            some = order[bounds[at] : bounds[at + 1]]
            if len(some) > 0:
                state[:, some] = state[:, some] @ rest
        some = order[: bounds[1]]
        state[:, some] = state[:, some] @ self._common
        self._maps, self._common, self._work = [], None, 0
        self._age.zero_()
        return state
