"""Training samples that lie in files larger than memory."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dd.support.checks import check_count

__all__ = ["Chunks"]


class Chunks(Dataset[tuple[Tensor, ...]]):
    """Arrays as a data set of chunks of consecutive rows, each read when it is asked for.

    One full-batch step is one pass over the chunks, the gradient of every chunk's share of the loss
    added up before ``optimizer.step()``.

    The noise model, fitted on the same arrays, tells the optimizer which samples a chunk holds:
    ``dd.NoiseModel.fit(inputs, labels)`` reads a ``numpy.memmap`` in blocks as well. A file opened
    with ``mode="c"`` is not copied, only paged in; one opened otherwise is, chunk by chunk.
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

    Example:
        >>> chunks = dd.Chunks(X, y, rows=200)
        >>> [tuple(inputs.shape) for inputs, _ in chunks]
        [(200, 50), (200, 50), (100, 50)]
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
        >>> for inputs, labels in chunks:
        ...     loss = torch.nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
        ...     (loss / chunks.num_samples).backward()
        >>> optimizer.step()
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

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: of mapped files where they are, not what they hold."""
        arrays = [_Mapped.of(array) or array for array in self._arrays]
        return {**self.__dict__, "_arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files again."""
        self.__dict__.update(state)
        self._arrays = [a.open() if isinstance(a, _Mapped) else a for a in self._arrays]


@dataclass(frozen=True)
class _Mapped:
    """Where a mapped array lies."""

    path: Any
    dtype: Any
    mode: Any
    offset: int
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @classmethod
    def of(cls, array: np.ndarray[Any, Any] | Tensor) -> "_Mapped | None":
        """Of a whole map of a named file; None of anything else."""
        base: Any = getattr(array, "base", None)
        if not isinstance(array, np.memmap) or not isinstance(base, mmap.mmap):
            return None
        if array.filename is None:
            return None
        order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
        # A file is not to be emptied by mapping it again.
        mode = "r+" if array.mode == "w+" else array.mode
        return cls(array.filename, array.dtype, mode, array.offset, array.shape, order)

    def open(self) -> np.ndarray[Any, Any]:
        """Map it."""
        return np.memmap(self.path, self.dtype, self.mode, self.offset, self.shape, self.order)


def _rows_of(array: np.ndarray[Any, Any] | Tensor, rows: slice) -> Tensor:
    some = array[rows]
    if isinstance(some, Tensor):
        return some
    # Nothing that a training loop does to a chunk may reach a file; and torch could not keep it
    # from memory that must not be written to.
    private = getattr(array, "mode", "c") == "c" and some.flags.writeable
    return torch.from_numpy(np.asarray(some) if private else np.array(some))
