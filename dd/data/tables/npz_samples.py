"""Features and labels of an .npz file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.npz import NpzError, NpzReader
from dd.data.tables.arrow_columns import EXACT
from dd.data.tables.labels import Labels

__all__ = ["NpzPart", "NpzSamples", "read_npz"]

Array = npt.NDArray[Any]

# Names of features and labels.
TRAIN = (
    ("train_features", "train_labels"),
    ("features", "labels"),
    ("X_train", "y_train"),
    ("X", "y"),
)
TEST = (("test_features", "test_labels"), ("X_test", "y_test"))
COLUMN_NAMES = "feature_names"
# What scipy.sparse.save_npz writes.
SPARSE = {"data", "shape", "format"}


@dataclass(frozen=True, eq=False)
class NpzPart:
    """Training or test samples.

    Attributes:
        source: what they are called in messages.
        features: shape (n, d), float64.
        labels: one a sample.
        exact: columns of whole numbers that float64 rounds, by their place, shape (n,).
    """

    source: str
    features: npt.NDArray[np.float64]
    labels: Labels
    exact: dict[int, npt.NDArray[np.object_]]


@dataclass(frozen=True, eq=False)
class NpzSamples:
    """What a file holds.

    Attributes:
        parts: the training samples, and the test samples where there are some.
        names: of the features; their numbers where the file has none.
        named: whether they are the file's own.
        notes: on how the file was understood.
    """

    parts: list[NpzPart]
    names: list[str]
    named: bool
    notes: list[str] = field(default_factory=list)


def read_npz(path: Path) -> NpzSamples:
    """Read training samples, and test samples where there are some.

    Raises:
        ValueError: if the file is damaged, or its arrays are not of this form.
    """
    try:
        with NpzReader(path) as reader:
            return _read(path, reader)
    except NpzError as error:
        raise ValueError(f"{path} cannot be used: {error}; write it again with np.savez") from error


def _read(path: Path, reader: NpzReader) -> NpzSamples:
    keys = reader.keys
    train, test = _pair(path, keys, TRAIN), _pair(path, keys, TEST)
    if train is None:
        sparse = (
            "; it is a sparse matrix of SciPy: np.savez(path, features=matrix.toarray(), "
            "labels=labels)"
        )
        raise ValueError(
            f"{path} must hold the arrays features and labels, or one of the other pairs "
            f"{', '.join(' and '.join(pair) for pair in TRAIN if pair[0] != 'features')}; it "
            f"holds {', '.join(keys) or 'none at all'}{sparse if set(keys) >= SPARSE else ''}"
        )
    notes: list[str] = []
    pairs = [train] if test is None else [train, test]
    parts = [
        _part(f"{path}: {pair[0]}", reader.read(pair[0]), reader.read(pair[1]), notes)
        for pair in pairs
    ]
    widths = [part.features.shape[1] for part in parts]
    if len(set(widths)) > 1:
        raise ValueError(
            f"{parts[1].source} has {widths[1]} features a sample, {parts[0].source} has "
            f"{widths[0]}"
        )
    used = {name for pair in pairs for name in pair}
    names = [str(number) for number in range(widths[0])]
    named = COLUMN_NAMES in keys
    if named:
        own = reader.read(COLUMN_NAMES)
        if (
            own.dtype.kind not in "US"
            or own.shape != (widths[0],)
            or len(set(own.tolist())) < len(own)
        ):
            raise ValueError(
                f"{path}: {COLUMN_NAMES} must be {widths[0]} different names of type str, got "
                f"shape {own.shape} of {own.dtype}"
            )
        names = [str(each).strip() for each in own.astype(str).tolist()]
    rest = [key for key in keys if key not in used | {COLUMN_NAMES}]
    if rest:
        notes.append(f"arrays of {path} that are not read: {', '.join(rest)}")
    return NpzSamples(parts, names, named, notes)


def _pair(
    path: Path, keys: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[str, str] | None:
    """The pair of arrays that a file has.

    Raises:
        ValueError: if it has more than one, or half of one.
    """
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{path} holds {', '.join(twice)} more than once; write it again")
    found = [pair for pair in pairs if pair[0] in keys or pair[1] in keys]
    if len(found) > 1:
        have = " and ".join(name for pair in found for name in pair if name in keys)
        raise ValueError(
            f"{path} holds {have}, and which are meant is not to be told; save one pair of them"
        )
    for pair in found:
        for name, other in (pair, pair[::-1]):
            if name not in keys:
                raise ValueError(f"{path} holds {other} and no {name}; save both")
    return found[0] if found else None


def _part(source: str, features: Array, labels: Array, notes: list[str]) -> NpzPart:
    """Samples that can be trained on.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check_features(source, features)
    labels = _one_a_sample(source, features, labels, notes)
    exact = {}
    if features.dtype.kind in "iu" and features.dtype.itemsize == 8:
        low, high = features.min(0), features.max(0)
        # The negative of the smallest integer has no place among them.
        beyond = np.maximum(np.abs(low.astype(float)), np.abs(high.astype(float))) > EXACT
        exact = {
            int(place): np.array(features[:, place].tolist(), dtype=object)
            for place in np.nonzero(beyond)[0]
        }
    with np.errstate(over="ignore"):
        return NpzPart(source, features.astype(np.float64), Labels.of(source, labels), exact)


def _check_features(source: str, features: Array) -> None:
    """Check type and shape.

    Raises:
        ValueError: if they are no matrix of numbers.
    """
    if features.dtype.kind not in "fiub":
        remedy = {
            "U": "; write them as numbers: features.astype(float)",
            "S": "; write them as numbers: features.astype(float)",
            "c": "; real and imaginary parts make two features",
            "V": "; numpy.lib.recfunctions.structured_to_unstructured makes a matrix of records",
            "M": "; write dates as numbers, such as seconds since a common moment",
            "m": "; write times as numbers, such as seconds",
        }.get(features.dtype.kind, "")
        raise ValueError(
            f"{source}: features must be numbers, got data type {features.dtype}{remedy}"
        )
    if features.ndim != 2 or features.size == 0:
        remedy = (
            "; flatten each sample into a row: features.reshape(len(features), -1)"
            if features.ndim > 2
            else ""
        )
        raise ValueError(
            f"{source}: features must have shape (samples, dimension), neither of them zero, got "
            f"{features.shape}{remedy}"
        )


def _one_a_sample(source: str, features: Array, labels: Array, notes: list[str]) -> Array:
    """Labels of shape (n,).

    Raises:
        ValueError: if they have another shape.
    """
    n = len(features)
    if labels.shape == (n,):
        return labels
    if labels.shape in ((n, 1), (1, n)):
        notes.append(f"labels of {source} have shape {labels.shape} and are read as ({n},)")
        return labels.reshape(n)
    remedy = ""
    if labels.ndim == 2 and len(labels) == n:
        remedy = "; where each row marks its class (one-hot), save labels.argmax(1)"
    elif labels.ndim == 1 and len(labels) == features.shape[1]:
        remedy = "; where each column is a sample, save features.T"
    raise ValueError(
        f"{source}: expected one label for each of {n} samples, got shape {labels.shape}{remedy}"
    )
