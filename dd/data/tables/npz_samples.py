"""Features and labels of an .npz file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.npz import NpzError, NpzReader
from dd.data.tables.arrow_columns import EXACT
from dd.data.tables.labels import Labels, text_of
from dd.data.tables.listed import listed
from dd.data.tables.samples import Samples

__all__ = ["read_npz"]

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


def read_npz(path: Path) -> tuple[Samples, Samples | None]:
    """Read training samples, and test samples where there are some.

    Raises:
        ValueError: if the file is damaged, or its arrays are not of this form.
    """
    try:
        with NpzReader(path) as reader:
            return _read(path, reader)
    except NpzError as error:
        raise ValueError(f"{path} cannot be used: {error}; write it again with np.savez") from error


def _read(path: Path, reader: NpzReader) -> tuple[Samples, Samples | None]:
    keys = reader.keys
    pair, apart = _pair(path, keys, TRAIN), _pair(path, keys, TEST)
    if pair is None:
        sparse = (
            "; it is a sparse matrix of SciPy: np.savez(path, features=matrix.toarray(), "
            "labels=labels)"
        )
        raise ValueError(
            f"{path} must hold the arrays features and labels, or one of the other pairs "
            f"{', '.join(' and '.join(pair) for pair in TRAIN if pair[0] != 'features')}; it "
            f"holds {', '.join(keys) or 'none at all'}{sparse if set(keys) >= SPARSE else ''}"
        )
    own = reader.read(COLUMN_NAMES) if COLUMN_NAMES in keys else None
    rest = [key for key in keys if key not in {*pair, *(apart or ()), COLUMN_NAMES}]
    train = _samples(path, reader, pair, own)
    if rest:
        said = f"arrays of {path} that are not read: {', '.join(rest)}"
        train = replace(train, notes=[*train.notes, said])
    return train, None if apart is None else _samples(path, reader, apart, own)


def _samples(path: Path, reader: NpzReader, pair: tuple[str, str], names: Array | None) -> Samples:
    """Samples that can be trained or tested on.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    source = f"{path}: {pair[0]}"
    notes: list[str] = []
    features = _checked_features(source, reader.read(pair[0]))
    labels = _one_a_sample(source, features, reader.read(pair[1]), notes)
    with np.errstate(over="ignore"):
        numbers = features.astype(np.float64)
    width = features.shape[1]
    own = [str(n) for n in range(width)]
    if names is not None:
        own = _checked_names(f"{path}: {COLUMN_NAMES}", names, pair[0], width)
    return Samples(
        source,
        numbers,
        Labels.of(source, labels),
        own,
        names is not None,
        _beyond_double(features),
        notes=notes,
    )


def _checked_names(source: str, names: Array, features: str, width: int) -> list[str]:
    """Names of features, without spaces around them.

    Raises:
        ValueError: if they are not as many as the features, or two are the same.
    """
    if names.dtype.kind not in "US" or names.shape != (width,):
        raise ValueError(
            f"{source} must be {width} different names of type str, one for each of {features}, "
            f"got shape {names.shape} of {names.dtype}"
        )
    found = [str(each).strip() for each in text_of(source, names).tolist()]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(
            f"{source} must be {width} different names, spaces around them apart, and has "
            f"{listed(twice)} more than once; rename one"
        )
    return found


def _beyond_double(features: Array) -> dict[int, npt.NDArray[np.object_]]:
    """Columns of whole numbers that double precision rounds, by their place."""
    if features.dtype.kind not in "iu" or features.dtype.itemsize < 8:
        return {}
    low, high = features.min(0), features.max(0)
    # The negative of the smallest integer has no place among them. The first that is rounded is
    # rounded to the last that is not.
    beyond = np.maximum(np.abs(low.astype(float)), np.abs(high.astype(float))) >= EXACT
    return {
        int(place): np.array(features[:, place].tolist(), dtype=object)
        for place in np.nonzero(beyond)[0]
    }


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


def _checked_features(source: str, features: Array) -> Array:
    """A matrix of numbers.

    Raises:
        ValueError: if it is something else.
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
    return features


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
