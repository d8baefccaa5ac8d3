"""Rows of a large tensor a few at a time, so that what is made of them stays in cache."""

import torch
from torch import Tensor

__all__ = ["bin_groups", "row_blocks", "tall_product"]

# Numbers of a block a core: 1 MB in single precision, within its cache.
_CACHED = 2**18
# Numbers of a product's result from which on BLAS has enough of them to share out among threads.
_WIDE = 2**15
# Rows that repay a product of their own, and such products a thread, so that none waits for long.
_TALL, _SHARES = 256, 2
# On an accelerator a block must keep thousands of threads busy, and every one costs a launch.
_LAUNCHED, _MOST = 2**20, 8


def row_blocks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of rows that together hold all.

    Args:
        rows: number of rows, n.
        width: numbers that are made of a row at a time.
        device: where.

    Returns:
        At least one slice, of at least one row each where there are any.
    """
    on_cpu = device.type == "cpu"
    numbers = _CACHED * torch.get_num_threads() if on_cpu else max(_LAUNCHED, rows * width // _MOST)
    length = max(1, numbers // max(width, 1))
    return [slice(start, min(start + length, rows)) for start in range(0, max(rows, 1), length)]


def bin_groups(bins: int, device: torch.device) -> list[slice]:
    """Slices of the bins that go into one batched product.

    On the CPU each by itself: threads share out the bins of a batch whole, and some would wait.

    Args:
        bins: number of bins, B.
        device: where.
    """
    together = 1 if device.type == "cpu" else bins
    return [slice(start, start + together) for start in range(0, bins, together)]


def tall_product(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i a_i b_iᵀ over the rows of two tall matrices.

    BLAS shares a product out among threads along its result, which is small here; this does along
    the rows.

    Args:
        left: a, shape (m, p).
        right: b, shape (m, q).

    Returns:
        Shape (p, q).
    """
    threads, (rows, width) = torch.get_num_threads(), left.shape
    length = rows // (_SHARES * threads)
    is_small = width * right.shape[1] < _WIDE
    if left.device.type != "cpu" or threads == 1 or length < _TALL or not is_small:
        return left.mT @ right
    shared = slice(_SHARES * threads * length)
    parts = [values[shared].unflatten(0, (-1, length)) for values in (left, right)]
    total = torch.bmm(parts[0].mT, parts[1]).sum(0)
    rest = slice(shared.stop, rows)
    return total.addmm_(left[rest].mT, right[rest]) if shared.stop < rows else total
