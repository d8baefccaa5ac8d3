"""A user's own features and labels."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from dd.data.counts import sample_count
from dd.data.reading import DataWarning, Reading
from dd.data.sample_file import check_finite, read_samples
from dd.data.seeding import generator
from dd.data.split import Split
from dd.data.standardise import check_scaling, standardise
from dd.data.tables.agreement import aligned, doubts_of, order_doubts
from dd.data.tables.labels import numbered
from dd.data.tables.listed import listed
from dd.data.tables.samples import Samples

__all__ = ["probe"]

REMEDY = "point data.path at a larger file"
# Of fewer samples a class has no spread to speak of.
FEW = 5


def probe(
    *,
    path: str | os.PathLike[str] | None = None,
    test_path: str | os.PathLike[str] | None = None,
    test_share: float | None = None,
    label: str = "label",
    drop: Sequence[str | int] = (),
    keep: Sequence[str | int] = (),
    num_train: int | None = None,
    scaling: str = "coordinate",
    seed: int = 0,
) -> Split:
    """Read features and labels, and standardise the features by the training samples.

    Test samples are those of ``test_path``, a random share of ``path``, or the test arrays of an
    .npz file; without any of them the test set is empty. Classes are numbered in the order of their
    sorted labels, and are the mixture components. Columns of two files are matched by their names.
    What was read, and how it was understood, is the split's ``reading``.

    Args:
        path: the file, .npz, .csv or .parquet (:func:`~dd.data.sample_file.read_samples`).
        test_path: another file of the same features.
        test_share: share of the samples to test on, between 0 and 1.
        label: column of the labels in a table.
        drop: columns to leave out.
        keep: columns that are features although they look like row numbers.
        num_train: training samples; None takes all there are.
        scaling: see :func:`~dd.data.standardise.standardise`.
        seed: of the samples drawn; non-negative integer.

    Raises:
        FileNotFoundError: if a file is missing.
        RuntimeError: if a table is to be read without the package that reads it.
        ValueError: if an argument is out of range, or a file cannot be trained on.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from dd.data import probe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/mine.npz", features=X.numpy(), labels=y.numpy())
        ...     split = probe(path=f"{folder}/mine.npz", test_share=0.2)
        >>> split.train_inputs.shape, split.test_inputs.shape
        (torch.Size([400, 50]), torch.Size([100, 50]))
    """
    check_scaling(scaling)
    if path is None:
        raise ValueError(
            "data.path=... must name a file of features and labels, .npz, .csv or .parquet"
        )
    train, test = read_samples(path, label, drop, keep)
    train, test = _tested(train, test, test_path, test_share, label=label, drop=drop, keep=keep)
    for setting, names in (("data.drop", drop), ("data.keep", keep)):
        _check_named(setting, [str(each) for each in names], train, test)
    check_finite(train)
    if test is not None:
        check_finite(test)
    train, test = _centred(train, test)
    doubts = order_doubts(train)
    if test_share is not None:
        train, test = _divided(train, test_share, seed)
    classes, targets, test_targets, label_notes = numbered(
        train.labels, None if test is None else test.labels
    )
    asked = sample_count("num_train", num_train, len(targets), "samples", REMEDY)
    order = torch.randperm(len(targets), generator=generator(seed, "data/subset/num_train"))
    # All of them in the order of the file.
    chosen = order[:asked].sort().values.numpy()
    train, targets = train.rows(chosen), targets[chosen]
    counts = _counted(train.source, classes, targets, test_targets)
    if test is not None:
        doubts += doubts_of(train, test, divided=test_share is not None)
    features = torch.from_numpy(train.features)
    empty = features[:0] if test is None else torch.from_numpy(test.features)
    inputs, test_inputs, constant = standardise(features, empty, scaling)
    theirs = () if test is None else test.notes
    files = [str(path)] if test_path is None else [str(path), str(test_path)]
    few = [f"class {name!r} has {n} training samples" for name, (n, _) in counts.items() if n < FEW]
    reading = Reading(
        files=files,
        train_samples=len(targets),
        test_samples=len(test_targets),
        features=train.features.shape[1],
        left_out=_left_out(train, test),
        constant=[name for name, same in zip(train.names, constant, strict=True) if same],
        classes=counts,
        notes=list(dict.fromkeys([*train.notes, *theirs, *label_notes, *few])),
        doubts=doubts,
    )
    for doubt in doubts:
        warnings.warn(f"{train.source}: {doubt}", DataWarning, stacklevel=2)
    components = torch.from_numpy(targets)
    return Split(
        inputs,
        components.clone(),
        components,
        test_inputs,
        torch.from_numpy(test_targets),
        reading=reading,
    )


def _tested(
    train: Samples,
    test: Samples | None,
    test_path: str | os.PathLike[str] | None,
    test_share: float | None,
    *,
    label: str,
    drop: Sequence[str | int],
    keep: Sequence[str | int],
) -> tuple[Samples, Samples | None]:
    """Training and test samples of the same features.

    Raises:
        ValueError: if more than one setting gives test samples, or they do not fit.
    """
    given = [test is not None, test_path is not None, test_share is not None]
    if sum(given) > 1:
        raise ValueError(
            f"test samples come from one place: the test arrays of data.path ({_is(given[0])}), "
            f"data.test_path ({_is(given[1])}) or data.test_share ({_is(given[2])})"
        )
    if test_path is not None:
        test, apart = read_samples(test_path, label, drop, keep)
        if apart is not None:
            raise ValueError(
                f"data.test_path={test_path} holds training and test samples of its own; give it "
                "as data.path, or name a file of features and labels alone"
            )
    return train, None if test is None else aligned(train, test)


def _is(given: bool) -> str:
    return "given" if given else "not given"


def _check_named(setting: str, names: Sequence[str], train: Samples, test: Samples | None) -> None:
    """Check that columns of a setting are there.

    Raises:
        ValueError: if one is not.
    """
    there = {*train.names, *train.left_out}
    if test is not None:
        there |= {*test.names, *test.left_out}
    for name in names:
        if name not in there:
            raise ValueError(
                f"{train.source} has no column {name!r} but {listed(train.names)}; correct "
                f"{setting}"
            )


def _left_out(train: Samples, test: Samples | None) -> dict[str, str]:
    """Columns of either file that are no features, and why."""
    found = dict(train.left_out)
    if test is not None:
        for name, why in test.left_out.items():
            found.setdefault(name, f"{why}, in {test.source} alone")
    return found


def _divided(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Set a random share of the samples apart, of each class alike.

    Raises:
        ValueError: if the share is not between 0 and 1, leaves nothing on one side, or a class has
            a single sample.
    """
    total = len(samples.labels)
    valid = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < 1
    count = round(share * total) if valid else 0
    if not 0 < count < total:
        raise ValueError(
            f"data.test_share must be a number between 0 and 1 that leaves some of {total} samples "
            f"on either side, got {share!r}"
        )
    shuffled = torch.randperm(total, generator=generator(seed, "data/test_share")).numpy()
    by_class = shuffled[np.argsort(samples.labels.values[shuffled], kind="stable")]
    # Every (total/count)-th, so that each class gives its share.
    chosen = np.zeros(total, dtype=bool)
    chosen[by_class[np.floor((np.arange(count) + 0.5) * total / count).astype(int)]] = True
    lost = np.setdiff1d(samples.labels.values[chosen], samples.labels.values[~chosen])
    # Labels that are all different are no classes, as is said of them later.
    if len(lost) and 2 * len(np.unique(samples.labels.values)) <= total:
        raise ValueError(
            f"{samples.source}: all samples of class {lost[0]!s} would be tested on, and none "
            "trained on; leave out or merge classes of so few samples, or lower data.test_share"
        )
    return samples.rows(np.nonzero(~chosen)[0]), samples.rows(np.nonzero(chosen)[0])


def _counted(
    source: str,
    classes: Sequence[str],
    targets: npt.NDArray[np.int64],
    test_targets: npt.NDArray[np.int64],
) -> Mapping[str, tuple[int, int]]:
    """Training and test samples of each class.

    Raises:
        ValueError: if there are no training samples of one.
    """
    both = [np.bincount(each, minlength=len(classes)).tolist() for each in (targets, test_targets)]
    empty = [name for name, n in zip(classes, both[0], strict=True) if n == 0]
    if empty:
        raise ValueError(
            f"{source}: the num_train={len(targets)} samples drawn have none of class "
            f"{listed(empty, written=str)}; raise num_train"
        )
    return dict(zip(classes, zip(*both, strict=True), strict=True))


def _centred(train: Samples, test: Samples | None) -> tuple[Samples, Samples | None]:
    """Shift whole numbers that float64 rounds to where it does not."""
    columns = set(train.exact) | (set() if test is None else set(test.exact))
    if not columns:
        return train, test
    origins = {place: _integers(train, place)[0] for place in columns}
    return _shifted(train, origins), None if test is None else _shifted(test, origins)


def _shifted(samples: Samples, origins: Mapping[int, int]) -> Samples:
    features = samples.features.copy()
    for place, origin in origins.items():
        features[:, place] = (_integers(samples, place) - origin).astype(np.float64)
    return replace(samples, features=features, exact={})


def _integers(samples: Samples, place: int) -> npt.NDArray[np.object_]:
    if place in samples.exact:
        return samples.exact[place]
    return samples.features[:, place].astype(object)
