"""Labelled training and test samples from an .npz file, checked before they are used."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dd.data.npz import NpzError, NpzReader

__all__ = ["LabelledArrays", "load_features", "load_images"]

Array = npt.NDArray[Any]

BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class LabelledArrays:
    """Samples and their classes, training and test.

    Attributes:
        train: training samples, shape (n, …), in the file's own data type and mapped where the
            file allows it.
        train_labels: their classes, shape (n,), int64.
        test: test samples, shape (n_test, …).
        test_labels: their classes, shape (n_test,), int64.
    """

    train: Array
    train_labels: npt.NDArray[np.int64]
    test: Array
    test_labels: npt.NDArray[np.int64]


def load_features(path: str | os.PathLike[str]) -> LabelledArrays:
    """Load ``train_features``, ``train_labels``, ``test_features`` and ``test_labels``.

    Features are real numbers of any type, shape (samples, dimension), finite in float32; labels are
    integers from 0. Pickled arrays are refused.

    Args:
        path: an .npz file. Made by ``np.savez`` its features are memory-mapped and only the rows
            that are used are held; made by ``np.savez_compressed`` they are unpacked into memory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not of this form.
    """
    return _load(path, "features", _check_features)


def load_images(path: str | os.PathLike[str]) -> LabelledArrays:
    """Load ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Images are uint8, shape (samples, height, width, 3); the rest is as in :func:`load_features`.

    Args:
        path: an .npz file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not of this form.
    """
    return _load(path, "images", _check_images)


def _load(path: str | os.PathLike[str], kind: str, check: Any) -> LabelledArrays:
    keys = [f"train_{kind}", "train_labels", f"test_{kind}", "test_labels"]
    try:
        with NpzReader(path) as reader:
            train, train_labels, test, test_labels = map(reader.read, keys)
        check(keys[0], train)
        check(keys[2], test)
        if train.shape[1:] != test.shape[1:]:
            raise NpzError(
                f"samples of both sets must have one shape, but {keys[0]} has shape {train.shape} "
                f"and {keys[2]} has shape {test.shape}"
            )
        most = len(train) + len(test)
        return LabelledArrays(
            train,
            _labels("train_labels", train_labels, keys[0], len(train), most),
            test,
            _labels("test_labels", test_labels, keys[2], len(test), most),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file of {kind} to read: {error}. Point data.path=... at an .npz file "
            f"with the arrays {', '.join(keys)}."
        ) from error
    except NpzError as error:
        raise _unfit(Path(path), kind, keys, error) from error


def _unfit(path: Path, kind: str, keys: list[str], error: NpzError) -> ValueError:
    return ValueError(
        f"{path} cannot be used as a file of {kind}: {error}. It must be an .npz file with the "
        f"arrays {', '.join(keys)}: write it again with np.savez, or point data.path=... at "
        "another."
    )


def _check_features(key: str, array: Array) -> None:
    if array.dtype.kind not in "fiu":
        raise NpzError(f"{key} must hold real numbers, got data type {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise NpzError(
            f"{key} must have shape (samples, dimension), neither of them zero, got {array.shape}"
        )
    bad = 0
    for begin in range(0, len(array), BLOCK_ROWS):
        block = array[begin : begin + BLOCK_ROWS]
        with np.errstate(over="ignore"):
            bad += int((~np.isfinite(block.astype(np.float32)).all(axis=1)).sum())
    if bad:
        raise NpzError(
            f"{key} must be finite in float32, got {bad} of {len(array)} rows with NaN, infinity "
            "or a value beyond 3.4e38"
        )


def _check_images(key: str, array: Array) -> None:
    if array.dtype != np.uint8:
        raise NpzError(f"{key} must be uint8, got data type {array.dtype}")
    if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0:
        raise NpzError(
            f"{key} must have shape (samples, height, width, 3), none of them zero, "
            f"got {array.shape}"
        )


def _labels(key: str, labels: Array, of: str, count: int, most: int) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise NpzError(f"{key} must be integers, got data type {labels.dtype}")
    if labels.shape != (count,):
        raise NpzError(
            f"{key} must have shape ({count},), one label for each row of {of}, got {labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    # One output of the network is made for every class up to the largest.
    if low < 0 or high >= most:
        raise NpzError(
            f"{key} must number the classes from 0, fewer than the {most} samples of the file, "
            f"got labels {low} to {high}"
        )
    return labels.astype(np.int64)
