"""Tables in text: separators, encodings, decimal commas."""

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dd.data.tables.labels import WHOLE

__all__ = ["CsvTable", "read_csv"]

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
BLOCK_BYTES = 1 << 20
# What stands for a missing number, beside what pyarrow knows.
NO_NUMBER = ("?", "-", "--", ".", "None", "none", "<NA>", "NaT", "missing")
# The most that a column of whole numbers can have, beyond what single precision reaches.
DIGITS = 76
COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+\.\d*|[+-]?\d{1,3}(\.\d{3})+,\d*")


@dataclass(frozen=True, eq=False)
class CsvTable:
    """A table as it was parsed.

    Attributes:
        names: of the columns, without spaces around them.
        table: the columns, under their numbers; that of the labels is text as it was written.
        notes: on how the file was understood.
    """

    names: list[str]
    table: Any
    notes: list[str]


def read_csv(path: Path, label: str) -> CsvTable:
    """Parse a table.

    Args:
        path: of the file, in UTF-8.
        label: column whose cells are kept as they are written.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not in UTF-8, has no header, or numbers are written in two ways.
    """
    has_hexadecimals = _check_encoding(path)
    names, separator, lines = _header(path, label)
    text = [place for place, name in enumerate(names) if name == label]
    table = _parsed(path, names, separator, lines, text)
    if has_hexadecimals:
        # They would be taken for integers, those of 64 bits for negative ones.
        text += _hexadecimals(_parsed(path, names, separator, lines, list(range(len(names)))))
        table = _parsed(path, names, separator, lines, text)
    notes = [] if separator == "," else [f"columns are separated by {SEPARATORS[separator]}s"]
    if _has_decimal_commas(path, names, table, label):
        table = _parsed(path, names, separator, lines, text, ",")
        notes.append("numbers have decimal commas")
    if large := _beyond_int64(table):
        written = _parsed(path, names, separator, lines, [*text, *large])
        for place in large:
            integers = _as_integers(written.column(place))
            if integers is not None:
                table = table.set_column(place, str(place), integers)
    return CsvTable(names, table, notes)


def _check_encoding(path: Path) -> bool:
    """Refuse what is not UTF-8, and tell whether there may be hexadecimal numbers.

    Raises:
        ValueError: if it is not.
    """
    decoder, done, found = codecs.getincrementaldecoder("utf-8")(), 0, False
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            # One that is cut by the end of a block is seldom the only one.
            found |= b"0x" in block.lower()
            if b"\0" in block:
                raise ValueError(
                    f"{path} is no text in UTF-8, as it holds zero bytes (UTF-16 does); save it as "
                    "UTF-8: iconv -f UTF-16 -t UTF-8"
                )
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not in UTF-8 (byte 0x{error.object[error.start]:02x} near byte "
                    f"{done + error.start}); save it as UTF-8, for example with iconv -f LATIN1 "
                    "-t UTF-8 where it is in Latin-1"
                ) from error
            done += len(block)
    return found


def _header(path: Path, label: str) -> tuple[list[str], str, int]:
    """Names of the columns, what separates them, and the lines that they take.

    Raises:
        ValueError: if there is no line.
    """
    found = {}
    for separator in SEPARATORS:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
            try:
                header = next((cells for cells in reader if cells), None)
            except csv.Error as error:
                raise ValueError(f"{path} cannot be read as a table: {error}") from error
            if header is None:
                raise ValueError(f"{path} cannot be read as a table: it is empty")
            found[separator] = [name.strip() for name in header], reader.line_num
    # Text of one column may hold what separates the columns of other files.
    best = max(found, key=lambda each: (label in found[each][0], len(found[each][0])))
    return found[best][0], best, found[best][1]


def _hexadecimals(table: Any) -> list[int]:
    """Columns with a hexadecimal number, of a table of text."""
    import pyarrow.compute as compute

    found = [compute.match_substring_regex(each, r"^\s*0[xX]") for each in table.columns]
    return [place for place, each in enumerate(found) if compute.any(each).as_py()]


def _beyond_int64(table: Any) -> list[int]:
    """Columns that may hold whole numbers for which the parser knows no type but a rounded one."""
    import pyarrow
    import pyarrow.compute as compute

    reals = [n for n, each in enumerate(table.columns) if pyarrow.types.is_floating(each.type)]
    return [n for n in reals if (compute.max(compute.abs(table.column(n))).as_py() or 0) >= 2**63]


def _as_integers(column: Any) -> Any:
    """Numbers of a column of text to the last digit; None where one of them is not whole."""
    import pyarrow

    cells = [None if each is None else each.strip() for each in column.to_pylist()]
    numbers = [cell for cell in cells if cell is not None]
    if not all(WHOLE.fullmatch(cell) for cell in numbers) or max(map(len, numbers)) > DIGITS:
        return None
    exact = [None if cell is None else Decimal(cell) for cell in cells]
    return pyarrow.chunked_array([pyarrow.array(exact, pyarrow.decimal256(DIGITS))])


def _parsed(
    path: Path,
    names: Sequence[str],
    separator: str,
    lines: int,
    text: Sequence[int],
    decimal: str = ".",
) -> Any:
    """Parse the rows, some columns as text whatever they hold."""
    import pyarrow
    from pyarrow import csv as arrow

    missing = [*arrow.ConvertOptions().null_values, *NO_NUMBER]
    return arrow.read_csv(
        path,
        read_options=arrow.ReadOptions(
            column_names=[str(n) for n in range(len(names))], skip_rows=lines
        ),
        parse_options=arrow.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=arrow.ConvertOptions(
            column_types={str(place): pyarrow.string() for place in text},
            null_values=missing,
            decimal_point=decimal,
        ),
    )


def _has_decimal_commas(path: Path, names: Sequence[str], table: Any, label: str) -> bool:
    """Whether numbers are written with a comma for the point.

    Raises:
        ValueError: if a comma may as well separate thousands.
    """
    import pyarrow.types as types

    with_commas, certain = [], False
    for name, column in zip(names, table.columns, strict=True):
        if name == label or not types.is_string(column.type):
            continue
        cells = [each.strip() for each in column.drop_null().unique().to_pylist()]
        if any(GROUPED.fullmatch(each) for each in cells):
            raise ValueError(
                f"{path}: column {name!r} separates thousands, as in "
                f"{next(each for each in cells if GROUPED.fullmatch(each))!r}; write numbers "
                "without"
            )
        numbers = all(COMMA.fullmatch(each) or WHOLE.fullmatch(each) for each in cells)
        if numbers and any("," in each for each in cells):
            with_commas.append((name, next(each for each in cells if "," in each)))
            certain |= any("," in each and not THOUSANDS.fullmatch(each) for each in cells)
    if with_commas and not certain:
        name, example = with_commas[0]
        raise ValueError(
            f"{path}: column {name!r} has numbers as {example!r}, whose comma may be a decimal "
            "point or separate thousands; write them with a point, and without separators"
        )
    return bool(with_commas)
