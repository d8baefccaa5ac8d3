"""Columns that are constant, or would be but for rounding."""

import numpy as np
import numpy.typing as npt

__all__ = ["constant_columns"]

Array = npt.NDArray[np.float64]

# Deviation, in roundings of the largest value, of a constant that was computed in several ways.
SEVERAL = 4
# The smallest step between values on a lattice, over that of the largest value: half as much below
# a power of two, and as many decimals as are written may be a little coarser.
LEAST, MOST = 0.4, 1.3


def constant_columns(values: Array) -> npt.NDArray[np.bool_]:
    """Tell which columns hold one number, up to the rounding of single or double precision.

    A column is constant up to rounding where its deviation is a few units in the last place of its
    largest value and its values are a unit apart, as rounding leaves them. Whole numbers are exact.

    Args:
        values: shape (n, d), finite.

    Returns:
        Shape (d,).
    """
    low, high = values.min(0), values.max(0)
    size = np.maximum(np.abs(low), np.abs(high))
    constant = low == high
    # Halved, as the difference of the largest numbers would overflow.
    narrow = high / 2 - low / 2 <= _widest(len(values)) * np.finfo(np.float32).eps * size
    for column in np.nonzero(narrow & ~constant)[0]:
        own, most = values[:, column], float(size[column])
        constant[column] = any(_is_rounding(own, most, kind) for kind in (np.float32, np.float64))
    return constant


def _widest(n: int) -> float:
    # The range of n numbers is below √(2 n) deviations.
    return SEVERAL * float(np.sqrt(n))


def _is_rounding(values: Array, size: float, kind: type[np.floating]) -> bool:
    if values.std() > SEVERAL * np.finfo(kind).eps * size:
        return False
    distinct = np.unique(values)
    if bool((distinct == np.floor(distinct)).all()) and not (
        kind is np.float32 and bool((distinct == distinct.astype(kind)).all()) and size > 2**24
    ):
        return False
    unit = float(np.spacing(kind(size)))
    return LEAST * unit <= float(np.diff(distinct).min()) <= MOST * unit
