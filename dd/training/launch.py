"""The processes of one run, as ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "process_group"]


class Processes:
    """This process among those of a run: each takes its part of the samples of every update.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The name of this process's device, given that of the run's."""
        if self.size == 1 or name not in {"auto", "cuda"} or not torch.cuda.is_available():
            return name
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def part(self, rows: Tensor | None, num_samples: int) -> tuple[Tensor | None, float]:
        """This process's rows of an update, and the weight of their mean in the loss.

        Args:
            rows: of the update, shape (m,); None for all n samples in their order.
            num_samples: n.

        Returns:
            The rows, and their number times that of processes over m: the mean over processes of
            such losses is the mean over the m rows.

        Raises:
            ValueError: if there are fewer rows than processes.
        """
        if self.size == 1:
            return rows, 1.0
        everything = torch.arange(num_samples) if rows is None else rows
        if len(everything) < self.size:
            raise ValueError(
                f"an update of {len(everything)} samples leaves some of {self.size} processes "
                "without any; raise data.batch_size, or choose one that leaves no smaller rest"
            )
        own = everything.tensor_split(self.size)[self.rank]
        return own, len(own) * self.size / len(everything)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as updates run it: with gradients averaged over processes."""
        return model if self.size == 1 else DistributedDataParallel(model)


@contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Hold the group of the processes for the time of a run."""
    if processes.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
