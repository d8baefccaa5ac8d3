"""Features and labels from a table, .csv or .parquet."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.tables.arrow_columns import decoded, integers_beyond_double, numbers_of, refusal
from dd.data.tables.csv_file import read_csv
from dd.data.tables.labels import Labels
from dd.data.tables.listed import listed
from dd.data.tables.row_numbers import is_nameless
from dd.data.tables.samples import Samples

__all__ = ["read_table"]


def read_table(
    path: Path, label: str, drop: Sequence[str] = (), keep: Sequence[str] = ()
) -> Samples:
    """Read a table of one row a sample.

    Args:
        path: of the file; its ending says which of the two it is.
        label: column of the labels.
        drop: columns to leave out unread, where they are there.
        keep: columns that are features although they look like an index.

    Raises:
        RuntimeError: if pyarrow is not installed.
        ValueError: if the file is damaged, a column is not there or not a number, or a label is
            missing.
    """
    names, table, notes = _arrow_table(path, label)
    # As pandas calls them.
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column {listed(twice)}; rename one")
    if label not in names:
        raise ValueError(
            f"{path} has no column {label!r}, only {listed(names)}{_hint(names, label)}"
        )
    if _is_number(label) and not _are_numbers_from_0(names) and _are_numbers(names):
        raise ValueError(
            f"{path}: the first line, {listed(names)}, looks like a row and would be taken for "
            "the names of the columns; put a line of names above it"
        )
    columns = {
        name: decoded(table.column(place))
        for place, name in enumerate(names)
        if name != label and name not in drop
    }
    left_out = {name: "data.drop" for name in names if name in drop and name != label}
    left_out |= {
        name: why
        for name, column in columns.items()
        if name not in keep and (why := _no_feature(table, name, column))
    }
    columns = {name: column for name, column in columns.items() if name not in left_out}
    if not columns or table.num_rows == 0:
        beside = f" ({', '.join(f'{n}: {why}' for n, why in left_out.items())})" if left_out else ""
        raise ValueError(
            f"{path} has {table.num_rows} rows and {len(columns)} columns of features beside "
            f"{label!r}{beside}; it needs one of each at least"
        )
    labels = _labels(path, table.column(names.index(label)), label)
    features, exact = _features(path, names, columns)
    return Samples(
        str(path),
        np.concatenate(list(features.values()), axis=1),
        labels,
        list(features),
        True,
        exact,
        left_out,
        notes,
    )


def _arrow_table(path: Path, label: str) -> tuple[list[str], Any, list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError(
            f"reading {path} needs the package pyarrow: pip install 'decoupled-descent[tables]', "
            "or give an .npz file"
        ) from error
    try:
        if path.suffix.lower() == ".csv":
            found = read_csv(path, label)
            return found.names, found.table, found.notes
        # Names of folders above the file are no columns of it.
        table = pyarrow.parquet.read_table(path, partitioning=None)
        return [name.strip() for name in table.column_names], table, []
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a table: {reason}") from error


def _no_feature(table: Any, name: str, column: Any) -> str | None:
    """Say why a column is none of the features."""
    if name in _pandas_index(table):
        return "the index of a pandas table"
    if not is_nameless(name):
        return None
    if column.null_count == len(column):
        return "empty, and without a name"
    if refusal(column) == "text" and len(column.unique()) == len(column):
        return "row names, text that differs in every row of a column without a name"
    return None


def _pandas_index(table: Any) -> list[str]:
    metadata = (table.schema.metadata or {}).get(b"pandas")
    if metadata is None:
        return []
    try:
        found = json.loads(metadata).get("index_columns", [])
    except ValueError:
        return []
    # Row numbers are described, and no column.
    return [each for each in found if isinstance(each, str)]


def _features(
    path: Path, names: Sequence[str], columns: dict[str, Any]
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[int, npt.NDArray[np.object_]]]:
    """Numbers of each feature, shape (n, 1), and those that double precision rounds.

    Args:
        path: of the file.
        names: of all of its columns.
        columns: those that are features.

    Raises:
        ValueError: if a column holds something else, or an entry of a list has another's name.
    """
    others = {name: what for name, column in columns.items() if (what := refusal(column))}
    if others:
        kinds = sorted(set(others.values()))
        raise ValueError(
            f"{path}: columns {listed(list(others))} hold no numbers but {', '.join(kinds)}"
            f"{_example(columns, others)}; encode them as numbers ({_remedy(kinds)}), or leave "
            f"them out with data.drop=[{','.join(others)}]"
        )
    features: dict[str, npt.NDArray[np.float64]] = {}
    exact = {}
    for name, column in columns.items():
        try:
            values = numbers_of(column)
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r} holds {error}") from error
        if values.ndim == 1:
            rounded = integers_beyond_double(column)
            if rounded is not None:
                exact[len(features)] = rounded
            features[name] = values[:, None]
        else:
            own = {f"{name}[{place}]": values[:, [place]] for place in range(values.shape[1])}
            if both := [each for each in names if each in own]:
                raise ValueError(
                    f"{path} has a column {both[0]!r} beside the lists of column {name!r}, whose "
                    "entries are called so; rename one"
                )
            features |= own
    return features, exact


def _example(columns: dict[str, Any], others: dict[str, str]) -> str:
    """A cell of a column of text that is not a number."""
    texts = [name for name, what in others.items() if what == "text"]
    if not texts:
        return ""
    for each in columns[texts[0]].drop_null().unique().to_pylist():
        try:
            float(each)
        except ValueError:
            return f", such as {each!r}"
    return ""


def _remedy(kinds: Sequence[str]) -> str:
    said = {
        "text": "a column of 0 and 1 for each category",
        "dates or times": "seconds since a common moment",
    }
    return ", ".join(said.get(kind, "one column for each number") for kind in kinds)


def _labels(path: Path, column: Any, label: str) -> Labels:
    source = f"{path}: column {label!r}"
    column = decoded(column)
    if path.suffix.lower() == ".csv":
        return Labels.of_text(source, column.to_pylist())
    if column.null_count:
        raise ValueError(
            f"{path}: {column.null_count} of {len(column)} rows have no {label!r}; drop these rows"
        )
    import pyarrow.types as types

    kind = column.type
    if types.is_decimal(kind):
        return Labels.of_text(source, [format(each, "f") for each in column.to_pylist()])
    if refusal(column) not in (None, "text") or types.is_nested(kind):
        raise ValueError(f"{source} must hold integers, truth values or text, it holds {kind}")
    values = column.to_numpy()
    # Text comes as Python objects.
    return Labels.of(source, np.asarray(values, dtype=str) if values.dtype == object else values)


def _hint(names: Sequence[str], label: str) -> str:
    if _are_numbers(names):
        return "; these look like the first row: the file needs a line of names above it"
    if len(names) == 1:
        return "; are columns separated by commas, semicolons or tabs? Name it with data.label=..."
    near = difflib.get_close_matches(label.lower(), [name.lower() for name in names], n=1)
    spelt = [name for name in names if near and name.lower() == near[0]]
    return f"; name it with data.label={spelt[0] if spelt else '...'}"


def _are_numbers(names: Sequence[str]) -> bool:
    return sum(_is_number(name) for name in names) > len(names) / 2


def _are_numbers_from_0(names: Sequence[str]) -> bool:
    """Whether columns are numbered, as pandas and polars do where they have no names."""
    return [name for name in names if _is_number(name)] == [str(n) for n in range(len(names))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
