"""The processes over which the samples of one training run are spread."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Ranks"]


class Ranks:
    """Sums over processes; over one process it does nothing.

    Args:
        group: a ``torch.distributed`` process group, or None for a single process.

    Attributes:
        size: number of processes.
        rank: of this one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else torch.distributed.get_world_size(group)
        self.rank = 0 if group is None else torch.distributed.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of one shape on every rank over the ranks."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is up on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)
