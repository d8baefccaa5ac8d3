"""Files that are written whole or not at all, and tables in them."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read_rows", "remove_scratch", "replacing", "write_json", "write_rows"]


Row = TypeVar("Row")


def write_rows(
    path: str | os.PathLike[str], rows: Sequence[Any], columns: Sequence[str] | None = None
) -> None:
    """Write dataclass instances to a csv file, whole or not at all.

    Args:
        path: of the file.
        rows: instances of one class.
        columns: the header; None takes the fields' names of the first row.
    """
    header = [column.name for column in fields(rows[0])] if columns is None else columns
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(map(astuple, rows))


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; numbers that are not finite become null."""
    with replacing(path) as scratch:
        text = json.dumps(_finite_or_none(content), indent=2, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes the place of ``path`` on success only."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        _settle(scratch)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove what :func:`replacing` left in a folder where its process was killed."""
    for stray in folder.glob(".*.tmp"):
        stray.unlink()


def _settle(path: Path) -> None:
    """Have a file's content on the disk, so that no power failure leaves a name without it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(
    path: Path, columns: Sequence[str], of_cells: Callable[[Sequence[str]], Row]
) -> list[Row]:
    """Read a csv file of these columns.

    Args:
        path: of the file.
        columns: that it must have.
        of_cells: makes a row of the text of its cells.

    Raises:
        ValueError: if it has other columns, or a row is damaged.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != tuple(columns):
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}, got {', '.join(header)}"
            )
        try:
            return [of_cells(row) for row in reader]
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged in line {reader.line_num} ({error})") from error
