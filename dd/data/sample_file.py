"""A user's own features and labels from one file: .npz, .csv or .parquet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.npz import NpzError, NpzReader
from dd.data.table_file import read_table

__all__ = ["Samples", "read_samples"]

Array = npt.NDArray[Any]

# Names of features and labels in an .npz file, and of test samples where it has some.
NAMES = (
    ("train_features", "train_labels", "test_features", "test_labels"),
    ("features", "labels", None, None),
    ("X_train", "y_train", "X_test", "y_test"),
    ("X", "y", None, None),
)
TABLES = (".csv", ".parquet")
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Samples:
    """Features and labels as they stand in a file.

    Attributes:
        source: what they are called in messages.
        features: shape (n, d), float32, finite.
        labels: shape (n,), integers, truth values or text.
    """

    source: str
    features: npt.NDArray[np.float32]
    labels: Array


def read_samples(
    path: str | os.PathLike[str], label: str, drop: Sequence[str] = ()
) -> tuple[Samples, Samples | None]:
    """Read features and labels, and test samples where the file has them apart.

    An .npz file holds ``features`` (n, d) and ``labels`` (n,), or ``X`` and ``y``; or, with test
    samples, ``train_features``, ``train_labels``, ``test_features`` and ``test_labels``, or
    ``X_train``, ``y_train``, ``X_test``, ``y_test``. A table (.csv with a header, .parquet) has one
    row a sample, the labels in one column and a feature in every other.

    Args:
        path: of the file.
        label: column of the labels in a table.
        drop: columns of a table to leave out.

    Raises:
        FileNotFoundError: if there is no such file.
        RuntimeError: if a table is to be read without the package that reads it.
        ValueError: if the file is not of this form, or a feature is not a finite number.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; point data.path=... at an .npz, .csv or .parquet")
    if path.suffix.lower() in TABLES:
        names, columns, labels = read_table(path, label, drop)
        return checked(str(path), columns, labels, names), None
    if path.suffix.lower() != ".npz":
        raise ValueError(
            f"{path} cannot be read: its name must end in .npz, .csv or .parquet, which say what "
            "is in it"
        )
    if drop:
        raise ValueError(f"data.drop names columns of a table; {path} is none")
    return _read_npz(path)


def _read_npz(path: Path) -> tuple[Samples, Samples | None]:
    try:
        with NpzReader(path) as reader:
            names = next((each for each in NAMES if each[0] in reader.keys), None)
            if names is None:
                raise ValueError(
                    f"{path} must hold the arrays features and labels, or one of the other pairs "
                    f"{', '.join(f'{n[0]} and {n[1]}' for n in NAMES if n[0] != 'features')}; it "
                    f"holds {', '.join(reader.keys) or 'none at all'}"
                )
            train = checked(f"{path}: {names[0]}", reader.read(names[0]), reader.read(names[1]))
            if names[2] is None or names[2] not in reader.keys:
                return train, None
            assert names[3] is not None
            test = checked(f"{path}: {names[2]}", reader.read(names[2]), reader.read(names[3]))
            return train, test
    except NpzError as error:
        raise ValueError(f"{path} cannot be used: {error}; write it again with np.savez") from error


def checked(
    source: str, features: Array, labels: Array, names: Sequence[str] | None = None
) -> Samples:
    """Return features and labels that can be trained on.

    Args:
        source: what they are called in messages.
        features: shape (n, d).
        labels: shape (n,).
        names: of the d features, where they have some.

    Raises:
        ValueError: if shapes or types do not fit, or a feature is not finite in float32.
    """
    if features.dtype.kind not in "fiub":
        raise ValueError(f"{source}: features must be numbers, got data type {features.dtype}")
    if features.ndim != 2 or features.size == 0:
        raise ValueError(
            f"{source}: features must have shape (samples, dimension), neither of them zero, got "
            f"{features.shape}"
        )
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{source}: expected one label for each of {len(features)} samples, got shape "
            f"{labels.shape}"
        )
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)
    bad = ~np.isfinite(features)
    if bad.any():
        rows, columns = np.nonzero(bad)
        where = ", ".join(
            f"row {r} {'column ' + str(c) if names is None else repr(names[c])}"
            for r, c in zip(rows[:SHOWN].tolist(), columns[:SHOWN].tolist(), strict=True)
        )
        more = "" if len(rows) <= SHOWN else " and others"
        raise ValueError(
            f"{source}: features must be finite in float32, got {len(rows)} that are missing, "
            f"infinite or beyond 3.4e38 ({where}{more}, counted from 0); fill or drop these rows"
        )
    return Samples(source, features, labels)
