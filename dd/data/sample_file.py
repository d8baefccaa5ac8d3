"""A user's own features and labels from one file: .npz, .csv or .parquet."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.tables.labels import Labels
from dd.data.tables.npz_samples import read_npz
from dd.data.tables.row_numbers import is_nameless, looks_like_identifier, row_number
from dd.data.tables.table_file import read_table

__all__ = ["Samples", "check_finite", "read_samples"]

Array = npt.NDArray[Any]

TABLES = (".csv", ".parquet")
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Samples:
    """Features and labels as they stand in a file.

    Attributes:
        source: what they are called in messages.
        features: shape (n, d), float64.
        labels: one a sample.
        names: of the d features; their numbers in the file where they have no names.
        named: whether the names are the file's own.
        exact: features that float64 rounds, by their place, as Python's integers, shape (n,).
        left_out: columns of the file that are none of the features, and why.
        notes: on how the file was understood.
    """

    source: str
    features: npt.NDArray[np.float64]
    labels: Labels
    names: Sequence[str]
    named: bool
    exact: Mapping[int, npt.NDArray[np.object_]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def rows(self, index: npt.NDArray[np.int64]) -> "Samples":
        """Return some samples."""
        return replace(
            self,
            features=self.features[index],
            labels=self.labels.rows(index),
            exact={place: values[index] for place, values in self.exact.items()},
        )

    def columns(self, names: Sequence[str]) -> "Samples":
        """Return some features, in this order."""
        if list(names) == list(self.names):
            return self
        place = {name: number for number, name in enumerate(self.names)}
        order = [place[name] for name in names]
        return replace(
            self,
            features=self.features[:, order],
            names=list(names),
            exact={new: self.exact[old] for new, old in enumerate(order) if old in self.exact},
        )

    def without(self, left_out: Mapping[str, str]) -> "Samples":
        """Return the samples without some features, which are told why.

        Raises:
            ValueError: if none is left.
        """
        if not left_out:
            return self
        rest = [name for name in self.names if name not in left_out]
        if not rest:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
            raise ValueError(
                f"{self.source} has no feature ({why}); name those that are with data.keep=[...]"
            )
        return replace(self.columns(rest), left_out={**self.left_out, **left_out})


def read_samples(
    path: str | os.PathLike[str],
    label: str,
    drop: Sequence[str | int] = (),
    keep: Sequence[str | int] = (),
) -> tuple[Samples, Samples | None]:
    """Read features and labels, and test samples where the file has them apart.

    An .npz file holds ``features`` (n, d) and ``labels`` (n,), or ``X`` and ``y``, or either with
    ``train_`` before or ``_train`` after them; test samples are ``test_features`` and
    ``test_labels``, or ``X_test`` and ``y_test``; ``feature_names`` (d,) may name the columns. A
    table (.csv with a header, .parquet) has one row a sample, the labels in one column and a
    feature, or a list of features, in every other.

    A column that numbers the rows, or identifies them, is no feature: it is left out unless
    ``keep`` names it.

    Args:
        path: of the file.
        label: column of the labels in a table.
        drop: columns to leave out; of an .npz file without names their numbers, from 0.
        keep: columns that are features although they look like row numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        RuntimeError: if a table is to be read without the package that reads it.
        ValueError: if the file is not of this form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; point data.path=... at an .npz, .csv or .parquet")
    out, kept = [str(each) for each in drop], [str(each) for each in keep]
    if path.suffix.lower() in TABLES:
        found = read_table(path, label, out, kept)
        samples = Samples(
            str(path),
            found.features,
            found.labels,
            found.names,
            True,
            found.exact,
            found.left_out,
            found.notes,
        )
        return _without_row_numbers(samples, kept), None
    if path.suffix.lower() != ".npz":
        raise ValueError(
            f"{path} cannot be read: its name must end in .npz, .csv or .parquet, which say what "
            "is in it; np.savez('samples.npz', features=features, labels=labels) writes such a file"
        )
    arrays = read_npz(path)
    parts = [
        Samples(
            part.source, part.features, part.labels, arrays.names, arrays.named, part.exact,
            notes=arrays.notes if number == 0 else (),
        )
        for number, part in enumerate(arrays.parts)
    ]  # fmt: skip
    parts = [
        part.without({name: "data.drop" for name in arrays.names if name in out}) for part in parts
    ]
    train = _without_row_numbers(parts[0], kept)
    # What is no feature of the training samples is none of the test samples.
    return train, parts[1].without(_more(parts[0], train)) if len(parts) > 1 else None


def _more(before: Samples, after: Samples) -> dict[str, str]:
    return {name: why for name, why in after.left_out.items() if name not in before.left_out}


def _without_row_numbers(samples: Samples, keep: Sequence[str]) -> Samples:
    """Leave out what tells rows apart and nothing of them.

    Raises:
        ValueError: if a column without a name holds something else.
    """
    left_out, notes = {}, []
    with np.errstate(invalid="ignore"):
        spread = samples.features.max(0) - samples.features.min(0)
    for place, name in enumerate(samples.names):
        whole = samples.exact.get(place)
        own = samples.features[:, place] if whole is None else (whole - whole.min()).astype(float)
        counts = whole is not None or spread[place] == len(own) - 1
        suspect = samples.named and (is_nameless(name) or looks_like_identifier(name))
        # Values that are missing are refused later on.
        if name in keep or not np.isfinite(spread[place]) or not (counts or suspect):
            continue
        why = row_number(name if samples.named else "", own)
        if why is not None:
            left_out[name] = why
        elif samples.named and is_nameless(name):
            raise ValueError(
                f"{samples.source}: column {name!r} has no name and does not number the rows; if "
                f"it is a feature, name it or give data.keep=['{name}'], if not, "
                f"data.drop=['{name}']"
            )
        elif samples.named and looks_like_identifier(name):
            notes.append(
                f"column {name!r} has the name of an identifier and is taken as a feature; "
                f"data.drop=[{name}] leaves it out"
            )
    found = samples.without(left_out)
    return replace(found, notes=[*found.notes, *notes])


def check_finite(samples: Samples) -> None:
    """Check that every feature is a number of single precision's range.

    Raises:
        ValueError: if one is not.
    """
    features, names = samples.features, samples.names
    bad = ~(np.abs(features) <= np.finfo(np.float32).max)
    if not bad.any():
        return
    rows, columns = np.nonzero(bad)
    where = ", ".join(
        f"row {r} {repr(names[c]) if samples.named else 'column ' + names[c]}"
        for r, c in zip(rows[:SHOWN].tolist(), columns[:SHOWN].tolist(), strict=True)
    )
    more = "" if len(rows) <= SHOWN else " and others"
    empty = [names[c] for c in np.nonzero(np.isnan(features).all(0))[0].tolist()]
    remedy = f"leave out columns without any, data.drop=[{','.join(empty[:SHOWN])}], and "
    remedy = remedy if empty else ""
    raise ValueError(
        f"{samples.source}: features must be finite in float32, got {len(rows)} that are missing, "
        f"infinite or beyond 3.4e38 ({where}{more}, counted from 0); {remedy}fill or drop these "
        "rows"
    )
