"""A user's own features and labels from one file: .npz, .csv or .parquet."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dd.data.tables.npz_samples import read_npz
from dd.data.tables.row_numbers import is_nameless, looks_like_identifier, row_number
from dd.data.tables.samples import Samples
from dd.data.tables.table_file import read_table

__all__ = ["check_finite", "read_samples"]

TABLES = (".csv", ".parquet")
SHOWN = 5


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
    dropped = dict.fromkeys(out, "data.drop")
    if path.suffix.lower() in TABLES:
        table = read_table(path, label, out, kept)
        return _without_row_numbers(table.without(dropped), kept), None
    if path.suffix.lower() != ".npz":
        raise ValueError(
            f"{path} cannot be read: its name must end in .npz, .csv or .parquet, which say what "
            "is in it; np.savez('samples.npz', features=features, labels=labels) writes such a file"
        )
    train, test = read_npz(path)
    # What is no feature of the training samples is none of the test samples.
    train = _without_row_numbers(train.without(dropped), kept)
    return train, None if test is None else test.without(train.left_out)


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
