"""The processes over which the samples of one training run are spread."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "training_group"]


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

    def largest(self, number: int, device: torch.device) -> int:
        """Largest of one integer a rank."""
        if self.size == 1:
            return number
        most = torch.tensor(number, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(most)

    def agree(self, numbers: Tensor) -> bool:
        """Whether a tensor is the same on every rank."""
        if self.size == 1:
            return True
        least, most = numbers.detach().clone(), numbers.detach().clone()
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self.group)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool((least == most).all())

    def agree_on_rows(self, values: Tensor) -> bool:
        """Whether every rank has the same rows in one order, shape (n, j)."""
        known = values.double()
        weights = torch.arange(1, len(known) + 1, device=known.device).double()
        # Unseen samples are no numbers, so that ranks with other ones seen do not agree.
        seen = (~known.isnan()).double()
        return self.agree(torch.stack([weights @ known.nan_to_num(), weights @ seen]))

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, one after the other.

        Args:
            rows: shape (m, ...), m of each rank's own.
        """
        if self.size == 1:
            return rows
        most = self.largest(len(rows), rows.device)
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.size)]
        torch.distributed.all_gather(counts, counts[0].new_tensor([len(rows)]), group=self.group)
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded.contiguous(), group=self.group)
        return torch.cat([part[: int(m)] for part, m in zip(parts, counts, strict=True)])


def training_group(choice: Any, module: nn.Module) -> Any:
    """The process group that trains a module, or None for this process alone."""
    if choice is False:
        return None
    if choice is not None:
        return choice
    if isinstance(module, DistributedDataParallel):
        return module.process_group
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.group.WORLD if distributed.get_world_size() > 1 else None
