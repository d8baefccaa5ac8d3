"""Whether every sample stays with the process that keeps its shadow."""

import torch
from torch import Tensor

from dd.ranks import Ranks
from dd.samples import Placement, Samples

__all__ = ["Owners"]


class Owners:
    """Notices samples that come to two processes.

    Processes that know the same samples number them alike; where each knows its own alone, no
    sample can come to two.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._number_alike: bool | None = None

    def check(self, placement: Placement, samples: Samples, ranks: Ranks) -> None:
        """Take down the samples of a step.

        Args:
            placement: of this rank's rows.
            samples: of this rank.
            ranks: all of which make this call.

        Raises:
            RuntimeError: if a sample has been on two ranks.
        """
        assert samples.known is not None
        known = samples.known.values
        if self._number_alike is None:
            sums = known.double().nan_to_num().sum(0)
            count = sums.new_tensor([float(len(known))])
            self._number_alike = ranks.agree(torch.cat([sums, count]))
        if not self._number_alike:
            return
        if self._seen is None:
            self._seen = torch.zeros(len(known), dtype=torch.int32, device=known.device)
        rows = torch.arange(len(known)) if placement.rows is None else placement.rows
        rows = rows.to(known.device)
        has_new = not bool(self._seen[rows].all())
        self._seen[rows] = 1
        if ranks.largest(int(has_new), known.device) == 0:
            return
        twice = int((ranks.sum(self._seen) > 1).sum())
        if twice:
            raise RuntimeError(
                f"DecoupledDescent: {twice} training samples came to more than one process, away "
                "from their shadows. Give each process its own samples, such as "
                "torch.utils.data.Subset(dataset, range(rank, n, world_size)), shuffle those, and "
                "construct with noise.of(rows)."
            )
