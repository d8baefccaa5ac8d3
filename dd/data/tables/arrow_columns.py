"""Numbers of the columns of an Arrow table."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["decoded", "integers_beyond_double", "numbers_of", "refusal"]

# Whole numbers up to here are exact in double precision.
EXACT = 2**53


def decoded(column: Any) -> Any:
    """Return a column without dictionaries and extension types: what its values are."""
    import pyarrow

    kind = column.type
    if isinstance(kind, pyarrow.ExtensionType | pyarrow.FixedShapeTensorType):
        column = pyarrow.chunked_array(
            [chunk.storage for chunk in column.chunks], kind.storage_type
        )
        kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    return column


def refusal(column: Any) -> str | None:
    """Say what a column holds in place of numbers, or lists of them; None where they are."""
    import pyarrow.types as types

    kind = column.type
    if _is_list(kind):
        inner = kind.value_type
        return None if _is_number(inner) else f"lists of {inner}"
    if _is_number(kind):
        return None
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_temporal(kind):
        return "dates or times"
    return str(kind)


def numbers_of(column: Any) -> npt.NDArray[np.float64]:
    """Return numbers, shape (n,), or lists of k numbers, shape (n, k); NaN where one is missing.

    Raises:
        ValueError: if lists have different lengths.
    """
    import pyarrow
    import pyarrow.compute as compute

    if not _is_list(column.type):
        return _plain(column)
    missing = np.asarray(column.is_null())
    lengths = compute.list_value_length(column).drop_null().unique().to_pylist()
    if len(lengths) != 1:
        some = ", ".join(map(str, sorted(lengths)[:5]))
        raise ValueError(f"lists of different lengths ({some})" if lengths else "no lists at all")
    values = np.full((len(column), lengths[0]), np.nan)
    flat = pyarrow.chunked_array([chunk.flatten() for chunk in column.drop_null().chunks])
    values[~missing] = _plain(flat).reshape(-1, lengths[0]) if len(flat) else np.nan
    return values


def integers_beyond_double(column: Any) -> npt.NDArray[np.object_] | None:
    """Return whole numbers as Python's where double precision would round them, else None."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = column.type
    if not (types.is_integer(kind) or types.is_decimal(kind)) or column.null_count:
        return None
    bounds = compute.min_max(column).as_py()
    if len(column) == 0 or max(abs(bounds["min"]), abs(bounds["max"])) <= EXACT:
        return None
    whole = [int(each) for each in column.to_pylist()]
    return np.array(whole, dtype=object) if whole == column.to_pylist() else None


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        # A column without any value; the rows are named by the check of the values.
        or types.is_null(kind)
    )


def _plain(column: Any) -> npt.NDArray[np.float64]:
    import pyarrow

    plain = column.cast(pyarrow.int8()) if pyarrow.types.is_boolean(column.type) else column
    values: npt.NDArray[np.float64] = plain.cast(pyarrow.float64(), safe=False).to_numpy()
    return values
