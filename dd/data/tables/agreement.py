"""Whether training and test samples are of one kind: the same columns, in the same units, apart."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dd.data.tables.listed import listed
from dd.data.tables.samples import Samples
from dd.noise.copies import coincidences

__all__ = ["aligned", "doubts_of", "order_doubts"]

Array = npt.NDArray[Any]

SHOWN = 5
# Samples whose differences tell how often equal ones are draws of their own.
COMPARED = 512
# Pairs of equal samples over those that chance explains.
UNEXPLAINED = 3
# Deviations of test and training samples whose ratio is no chance, and samples that show it.
UNITS, FEWEST = 30.0, 20


def aligned(train: Samples, test: Samples) -> Samples:
    """Return test samples with the features of the training samples, in their order.

    Columns are matched by name where both files have names, else by their place.

    Raises:
        ValueError: if one has columns that the other lacks.
    """
    if not (train.named and test.named):
        return _by_place(train, test)
    test = test.without(train.left_out)
    missing = [name for name in train.names if name not in test.names]
    extra = [name for name in test.names if name not in train.names]
    if missing or extra:
        said = [
            *([f"no column {listed(missing)}, which {train.source} has"] if missing else []),
            *([f"{listed(extra)}, which {train.source} has not"] if extra else []),
        ]
        left_out = [name for name in missing if name in test.left_out]
        reason = "".join(f" ({n!r} is left out: {test.left_out[n]})" for n in left_out[:SHOWN])
        raise ValueError(
            f"{test.source} has {' and '.join(said)}{reason}; give both files the same columns, or "
            f"leave them out with data.drop=[{','.join([*missing, *extra])}]"
        )
    return test.columns(train.names)


def _by_place(train: Samples, test: Samples) -> Samples:
    """Test samples whose columns are those of the training samples by their order.

    Raises:
        ValueError: if they are more or fewer.
    """
    if not train.named and not test.named and _width(train) == _width(test):
        # One number is one column, unless a file alone has row numbers.
        test = test.without(train.left_out)
    if len(test.names) != len(train.names):
        raise ValueError(
            f"{_counted(test)}, {_counted(train)}; give both files the same columns, or leave some "
            "out with data.drop=[...]"
        )
    if list(test.names) == list(train.names):
        return test
    pairs = [f"{new!r} as {old!r}" for new, old in zip(test.names, train.names, strict=True)]
    without = [each.source for each in (train, test) if not each.named]
    note = (
        f"columns of {test.source} are taken for those of {train.source} by their order, as "
        f"{' and '.join(without)} ha{'s' if len(without) == 1 else 've'} no names for them: "
        f"{listed(pairs, SHOWN, str)}"
    )
    return replace(test, notes=[*test.notes, note])


def _width(samples: Samples) -> int:
    """Columns of the file."""
    return len(samples.names) + len(samples.left_out)


def _counted(samples: Samples) -> str:
    """How many features there are, in words, and what is none of them."""
    reasons = [f"{name!r}: {why}" for name, why in samples.left_out.items()]
    beside = f" beside what is left out ({listed(reasons, SHOWN, str)})" if reasons else ""
    return f"{samples.source} has {len(samples.names)} features a sample{beside}"


def order_doubts(samples: Samples) -> list[str]:
    """Say which features count the rows of a file that is sorted by its labels.

    Args:
        samples: all of a file, in its order.
    """
    labels = samples.labels.values
    changes = int((labels[1:] != labels[:-1]).sum())
    if len(labels) < FEWEST or changes >= len(np.unique(labels)):
        return []
    steps = np.diff(samples.features, axis=0)
    places = np.nonzero((steps > 0).all(0) | (steps < 0).all(0))[0].tolist()
    names = [samples.names[place] for place in places]
    if not names:
        return []
    return [
        f"rows are sorted by their labels, and {listed(names)} by row: where that is the order in "
        "which samples were written down, it tells their labels; leave it out with "
        f"data.drop=[{','.join(names)}]"
    ]


def doubts_of(train: Samples, test: Samples, *, divided: bool) -> list[str]:
    """Say why errors on the test samples may not be what they seem.

    Args:
        train: training samples.
        test: test samples, with the same features.
        divided: whether both are of one file, divided by chance.
    """
    found = [_shared(train, test, divided=divided), _units(train, test)]
    return [doubt for doubt in found if doubt is not None]


def _shared(train: Samples, test: Samples, *, divided: bool) -> str | None:
    """Samples that stand on both sides, unless in number and kind they are chance."""
    first, second = _as_rows(train.features), _as_rows(test.features)
    distinct, counts = np.unique(first, return_counts=True)
    place = np.searchsorted(distinct, second).clip(max=len(distinct) - 1)
    equal = distinct[place] == second
    pairs = float(counts[place[equal]].sum())
    if pairs == 0:
        return None
    some = train.features[: COMPARED // 2], test.features[: COMPARED // 2]
    likely = coincidences(torch.from_numpy(np.concatenate(some)))
    explained = UNEXPLAINED * likely * len(first) * len(second)
    if pairs <= explained + 3 * np.sqrt(explained):
        return None
    rows = np.nonzero(equal)[0]
    where = "" if divided else f" (test rows {_numbers(rows)}, counted from 0)"
    remedy = "drop copies from the file" if divided else "drop them from one of the files"
    return (
        f"{len(rows)} of {len(second)} test samples equal a training sample in every feature"
        f"{where}: the error on them is a training error; {remedy}"
    )


def _units(train: Samples, test: Samples) -> str | None:
    """Features whose test values are spread on another scale than the training values."""
    if min(len(train.labels), len(test.labels)) < FEWEST:
        return None
    own, theirs = train.features.std(0), test.features.std(0)
    varies = own > 0
    if not varies.any():
        return None
    with np.errstate(over="ignore"):
        ratio = theirs[varies] / own[varies]
    typical = float(np.median(ratio))
    if 1 / UNITS < typical < UNITS:
        return None
    return (
        f"test values vary {typical:.3g} times as much as training values in the middle one of "
        f"{len(ratio)} features; are both in the same units?"
    )


def _as_rows(features: Array) -> Array:
    # Zero has two signs.
    rows = np.ascontiguousarray(features + 0.0)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def _numbers(rows: Array) -> str:
    return ", ".join(map(str, rows[:SHOWN].tolist())) + (", ..." if len(rows) > SHOWN else "")
