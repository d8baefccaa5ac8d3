"""The samples of the rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Placement"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The samples of one training batch.

    Attributes:
        fingerprints: of the rows, shape (m, 3).
        index: sample of each row, shape (m,); None for all samples in their order.
        rows: the distinct samples in ascending order, shape (u,), or None likewise.
        position: where each row's sample stands in ``rows``, shape (m,), or None likewise.
        rows_on_cpu: ``rows`` on the CPU, or None likewise.
    """

    fingerprints: Tensor
    index: Tensor | None = None
    rows: Tensor | None = None
    position: Tensor | None = None
    rows_on_cpu: Tensor | None = None

    @classmethod
    def of(cls, fingerprints: Tensor, index: Tensor, num_samples: int) -> "Placement":
        """Place a batch by the sample of each row, on any device."""
        index = index.to(fingerprints.device)
        if len(index) == num_samples:
            everything = torch.arange(num_samples, device=index.device)
            if bool((index == everything).all()):
                return cls(fingerprints)
        on_cpu, position = torch.unique(index.cpu(), return_inverse=True)
        device = index.device
        return cls(fingerprints, index, on_cpu.to(device), position.to(device), on_cpu)

    @classmethod
    def joined(cls, parts: Sequence["Placement"], num_samples: int) -> "Placement":
        """Place the rows of several batches."""
        found = torch.cat([part.fingerprints for part in parts])
        if len(parts) == 1 and (parts[0].index is not None or len(found) == num_samples):
            return parts[0]
        # More samples may have come since a batch held all.
        index = [
            torch.arange(len(part.fingerprints), device=found.device)
            if part.index is None
            else part.index
            for part in parts
        ]
        return cls.of(found, torch.cat(index), num_samples)

    def by_sample(self, values: Tensor) -> Tensor:
        """Sum rows (m, ...) that are of one sample, shape (u, ...)."""
        if self.rows is None or self.position is None:
            return values
        total = values.new_zeros(len(self.rows), *values.shape[1:])
        return total.index_add_(0, self.position, values)
