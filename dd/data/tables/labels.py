"""What labels mean: which of them name the same class, in one file or in two."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.tables.arrow_columns import EXACT

__all__ = ["WHOLE", "Labels", "numbered", "text_of"]

Array = npt.NDArray[Any]
Key = int | float | str

# What programs write where there is no value.
MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "Null", "null", "NaT", "None"),
    *("?", ".", "--", "—"),
)
WHOLE = re.compile(r"[+-]?\d+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# A code such as 007 is not the number 7.
CODE = re.compile(r"[+-]?0\d+")
TRUTH = {"true": 1, "false": 0}
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Labels:
    """One label a sample, none of them missing.

    Attributes:
        source: what they are called in messages.
        values: shape (n,), integers, truth values, real numbers or text.
        written: the same as text of a file that has no types, shape (n,), or None.
    """

    source: str
    values: Array
    written: Array | None = None

    @classmethod
    def of(cls, source: str, values: Array) -> "Labels":
        """Return labels that have a type of their own.

        Args:
            source: what they are called in messages.
            values: shape (n,).

        Raises:
            ValueError: if they are neither numbers nor text, or one is missing.
        """
        if values.dtype.kind == "S":
            values = text_of(source, values)
        if values.dtype.kind == "U":
            values = np.char.strip(values)
        elif values.dtype.kind not in "iubf":
            raise ValueError(
                f"{source}: labels must be integers, truth values or text, got data type "
                f"{values.dtype}"
            )
        _refuse_missing(source, values)
        return cls(source, values)

    @classmethod
    def of_text(cls, source: str, text: Sequence[str]) -> "Labels":
        """Return labels of a file without types: numbers or truth values where all of them are.

        Args:
            source: what they are called in messages.
            text: one label a sample.

        Raises:
            ValueError: if one is missing.
        """
        # Quotes after a space are part of a cell to most readers.
        written = np.char.strip(np.char.strip(np.asarray(text, dtype=str)), '"')
        _refuse_missing(source, written)
        distinct, where = np.unique(written, return_inverse=True)
        codes = any(CODE.fullmatch(each) for each in distinct.tolist())
        numbers = None if codes else _as_numbers(distinct.tolist())
        if numbers is None:
            return cls(source, written, written)
        truth = all(each.lower() in TRUTH for each in distinct.tolist())
        values = np.asarray(numbers, dtype=bool if truth else None)
        if values.dtype.kind == "O" or values.tolist() != numbers:
            # No type holds them all, and rounded ones would be classes of other samples.
            return cls(source, written, written)
        return cls(source, values[where], written)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def kind(self) -> str:
        """What they are, in words."""
        return {"b": "truth values", "U": "text"}.get(self.values.dtype.kind, "numbers")

    def rows(self, index: npt.NDArray[np.int64]) -> "Labels":
        """Return those of some samples."""
        written = None if self.written is None else self.written[index]
        return Labels(self.source, self.values[index], written)


def text_of(source: str, values: Array) -> Array:
    """Return text, bytes of which are decoded.

    Args:
        source: what it is called in messages.
        values: of type str or bytes.

    Raises:
        ValueError: if bytes are not UTF-8.
    """
    if values.dtype.kind == "U":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: {error.object!r} is not in UTF-8; save text as str: where it is in "
            "Latin-1, np.char.decode(values, 'latin-1')"
        ) from error


def numbered(
    train: Labels, test: Labels | None
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """Number the classes from 0, in the order of the sorted labels of the training samples.

    Labels of another type are of the same class where they are the same number: 1, 1.0, "1" and
    true.

    Args:
        train: labels of the training samples.
        test: those of the test samples, if there are any.

    Returns:
        The classes' names, the class of each training and of each test sample, shapes (n,) and
        (n_test,), and notes on how labels were understood.

    Raises:
        ValueError: if the labels are no classes, or the test set has one that is not trained on.
    """
    values = train.values
    classes, targets = np.unique(values, return_inverse=True)
    whole = values.dtype.kind in "iubU" or bool((classes == np.floor(classes)).all())
    if not whole or 2 * len(classes) > len(values):
        raise ValueError(
            f"{train.source}: labels must name classes, each of several samples, got "
            f"{len(classes)} different values of type {values.dtype} in {len(values)} samples"
        )
    if len(classes) < 2:
        raise ValueError(f"{train.source}: all labels are {classes[0]!s}; it takes two classes")
    names = [_name(each) for each in classes.tolist()]
    notes = [*_alike(train, names)]
    if test is None:
        return names, targets.astype(np.int64), np.zeros(0, np.int64), notes
    if train.kind == "text" and test.written is not None and set(test.written) <= set(values):
        # A file without types may hold numbers alone of labels that are not all numbers.
        test = Labels(test.source, test.written, test.written)
    found, where = np.unique(test.values, return_inverse=True)
    index = _matched(train, classes.tolist(), test, found.tolist())
    if test.kind != train.kind:
        notes.append(
            f"labels are {train.kind} in {train.source} and {test.kind} in {test.source}; those "
            "that are equal as numbers are one class"
        )
    return names, targets.astype(np.int64), np.array(index, dtype=np.int64)[where], notes


def _matched(
    train: Labels, classes: Sequence[Any], test: Labels, found: Sequence[Any]
) -> list[int]:
    """The class of each label that the test samples have.

    Raises:
        ValueError: if one is of no class.
    """
    known: dict[Key, int] = {_key(each): number for number, each in enumerate(classes)}
    if train.kind != test.kind and "text" in (train.kind, test.kind):
        numbers = _as_numbers(classes if train.kind == "text" else found)
        if numbers is not None and train.kind == "text" and len(set(numbers)) == len(numbers):
            known = {each: number for number, each in enumerate(numbers)}
        elif numbers is not None and train.kind != "text":
            found = numbers
    unknown = [each for each in found if _key(each) not in known]
    if unknown:
        alike = {_name(each).casefold() for each in unknown} <= {
            _name(each).casefold() for each in classes
        }
        shown = ", ".join(_name(each) for each in unknown[:SHOWN])
        have = ", ".join(_name(each) for each in list(classes)[:SHOWN])
        more = ", ..." if len(classes) > SHOWN else ""
        raise ValueError(
            f"{test.source} has labels {shown}, which the training samples have not: these are "
            f"{test.kind}, and those of {train.source} are {train.kind}: {have}{more}"
            f"{' (other in upper and lower case alone)' if alike else ''}. Write both alike, or "
            "leave these rows out"
        )
    return [known[_key(each)] for each in found]


def _alike(labels: Labels, names: Sequence[str]) -> list[str]:
    """Notes on labels that may not have been meant as they were taken."""
    notes = []
    if labels.kind == "text":
        groups: dict[str, list[str]] = {}
        for name in names:
            number = NUMBER.fullmatch(name) is not None
            key = str(float(name)) if number else " ".join(name.split()).casefold()
            groups.setdefault(key, []).append(name)
        for same in groups.values():
            if len(same) > 1:
                notes.append(f"labels {', '.join(map(repr, same))} are classes of their own")
    elif labels.written is not None and len(set(labels.written.tolist())) > len(names):
        notes.append(
            f"labels of {labels.source} that are written differently and equal as numbers are one "
            "class"
        )
    if names[0] == "-1" and len(names) > 2 and names[1:3] == ["0", "1"]:
        notes.append("label -1 is a class; if it marks samples without a label, drop them")
    return notes


def _refuse_missing(source: str, values: Array) -> None:
    """Refuse labels that are none.

    Raises:
        ValueError: if there are any.
    """
    if values.dtype.kind == "f":
        bad, how = ~np.isfinite(values), "NaN or infinity"
    elif values.dtype.kind == "U":
        bad = np.isin(values, MISSING)
        # Of two classes the one may be called minus.
        if not np.isin(values, ["+"]).any():
            bad |= values == "-"
        how = ", ".join(map(repr, np.unique(values[bad]).tolist()))
    else:
        return
    if bad.any():
        rows = ", ".join(map(str, np.nonzero(bad)[0][:SHOWN].tolist()))
        more = ", ..." if bad.sum() > SHOWN else ""
        raise ValueError(
            f"{source}: {int(bad.sum())} of {len(values)} rows have no label but {how} (rows "
            f"{rows}{more}, counted from 0); drop these rows, or give their class another name"
        )


def _as_numbers(text: Sequence[str]) -> list[int | float] | None:
    """Numbers for labels that all are written as numbers, or all as truth values."""
    if all(each.lower() in TRUTH for each in text):
        return [TRUTH[each.lower()] for each in text]
    if all(WHOLE.fullmatch(each) for each in text):
        return [int(each) for each in text]
    if all(NUMBER.fullmatch(each) for each in text):
        return [_exact(float(each), each) for each in text]
    return None


def _exact(rounded: float, text: str) -> int | float:
    """The number that is written, as an integer where it is one that a float may round."""
    if abs(rounded) < EXACT or math.isinf(rounded):
        return rounded
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else rounded


def _key(label: Any) -> Key:
    # Equal numbers of any type have one hash.
    key: Key = label if isinstance(label, str) else label + 0
    return key


def _name(label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        return f"{label:.0f}"
    return str(label)
