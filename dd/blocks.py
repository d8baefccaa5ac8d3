"""Rows of a large tensor a few at a time, so that what is made of them stays in cache."""

import torch

__all__ = ["row_blocks"]

# Numbers of a block: 1 MB in single precision, within a core's cache.
_CACHED = 2**18
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
    numbers = _CACHED if device.type == "cpu" else max(_LAUNCHED, rows * width // _MOST)
    length = max(1, numbers // max(width, 1))
    return [slice(start, min(start + length, rows)) for start in range(0, max(rows, 1), length)]
