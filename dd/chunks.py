"""Training samples that lie in files larger than memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dd.checks import check_count

__all__ = ["Chunks"]


class Chunks(Dataset[tuple[Tensor, ...]]):
    """Arrays as a data set of chunks of consecutive rows, each read when it is asked for.

    One full-batch step is one pass over the chunks, the gradient of every chunk's share of the loss
    added up before ``optimizer.step()``::

        chunks = dd.Chunks(inputs, labels, rows=8192)
        for x, y in chunks:
            loss = F.cross_entropy(model(x), y, reduction="sum") / chunks.num_samples
            loss.backward()
        optimizer.step()

    The noise model, fitted on the same arrays, tells the optimizer which samples a chunk holds:
    ``dd.NoiseModel.fit(inputs, labels)`` reads a ``numpy.memmap`` in blocks as well. A file opened
    with ``mode="c"`` is not copied, only paged in; one opened with ``mode="r"`` is, chunk by chunk.
    ``DataLoader(chunks, batch_size=None, num_workers=1, pin_memory=True)`` reads ahead from a slow
    disk and passes chunks to a GPU through pinned memory.

    Args:
        arrays: of one length n, such as ``numpy.memmap`` or tensors.
        rows: of a chunk; the last one may have fewer.

    Attributes:
        num_samples: n.

    Raises:
        ValueError: if there are no arrays, or their lengths differ or are 0, or ``rows`` is not a
            positive integer.
    """

    def __init__(self, *arrays: np.ndarray[Any, Any] | Tensor, rows: int = 8192) -> None:
        check_count("Chunks: rows", rows)
        lengths = [len(array) for array in arrays]
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(
                f"Chunks: expected arrays with one row a sample each, got lengths {lengths}"
            )
        self.num_samples = lengths[0]
        self._arrays: Sequence[np.ndarray[Any, Any] | Tensor] = arrays
        self._rows = rows

    def __len__(self) -> int:
        """Number of chunks."""
        return -(-self.num_samples // self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        """Read a chunk: of each array a tensor of its rows.

        Raises:
            IndexError: if there is no chunk of this number.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"Chunks: chunk {number} of {len(self)}, counted from 0")
        rows = slice(number * self._rows, (number + 1) * self._rows)
        return tuple(_rows_of(array, rows) for array in self._arrays)


def _rows_of(array: np.ndarray[Any, Any] | Tensor, rows: slice) -> Tensor:
    some = array[rows]
    if isinstance(some, Tensor):
        return some
    # Torch could not keep anyone from writing to memory that must not be written to.
    return torch.from_numpy(some if some.flags.writeable else np.array(some))
