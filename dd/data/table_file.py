"""Features and labels from a table, .csv or .parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_table"]

Array = npt.NDArray[Any]

SHOWN = 8


def read_table(
    path: Path, label: str, drop: Sequence[str] = ()
) -> tuple[list[str], npt.NDArray[np.float64], Array]:
    """Read a table of one row a sample.

    Args:
        path: of the file; its ending says which of the two it is.
        label: column of the labels.
        drop: columns to leave out.

    Returns:
        Names of the features, their values, shape (n, d), NaN where one is missing, and the labels,
        shape (n,).

    Raises:
        RuntimeError: if pyarrow is not installed.
        ValueError: if the file is damaged, a column is not there or not a number, or a label is
            missing.
    """
    table = _arrow_table(path)
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column {_listed(twice)}; rename one")
    for name in (label, *drop):
        if name not in names:
            setting = "data.label" if name == label else "data.drop"
            raise ValueError(
                f"{path} has no column {name!r}, only {_listed(names)}; name it with {setting}=..."
            )
    features = [name for name in names if name != label and name not in drop]
    if not features or table.num_rows == 0:
        raise ValueError(
            f"{path} has {table.num_rows} rows and {len(features)} columns beside {label!r}; it "
            "needs one of each at least"
        )
    text = [name for name in features if not _is_number(table.schema.field(name).type)]
    if text:
        raise ValueError(
            f"{path}: columns {_listed(text)} hold no numbers; encode them as numbers, or leave "
            f"them out with data.drop=[{','.join(text)}]"
        )
    values = np.stack([_numbers(table.column(name)) for name in features], axis=1)
    return features, values, _labels(path, table.column(label), label)


def _arrow_table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError(
            f"reading {path} needs the package pyarrow: pip install 'decoupled-descent[tables]', "
            "or give an .npz file"
        ) from error
    try:
        if path.suffix.lower() == ".csv":
            return pyarrow.csv.read_csv(path)
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a table: {reason}") from error


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


def _numbers(column: Any) -> npt.NDArray[np.float64]:
    import pyarrow

    plain = column.cast(pyarrow.int8()) if pyarrow.types.is_boolean(column.type) else column
    values: npt.NDArray[np.float64] = plain.cast(pyarrow.float64(), safe=False).to_numpy()
    return values


def _labels(path: Path, column: Any, label: str) -> Array:
    if column.null_count:
        raise ValueError(
            f"{path}: {column.null_count} of {len(column)} rows have no {label!r}; drop these rows"
        )
    values = column.to_numpy()
    # Text comes as Python objects.
    return np.asarray(values, dtype=str) if values.dtype == object else values


def _listed(names: Sequence[str]) -> str:
    more = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} more"
    return ", ".join(map(repr, names[:SHOWN])) + more
