"""A user's own features and labels."""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dd.data.counts import sample_count
from dd.data.sample_file import Samples, read_samples
from dd.data.seeding import generator
from dd.data.split import Split
from dd.data.standardise import check_scaling, standardise

__all__ = ["probe"]

REMEDY = "point data.path at a larger file"


def probe(
    *,
    path: str | os.PathLike[str] | None = None,
    test_path: str | os.PathLike[str] | None = None,
    test_share: float | None = None,
    label: str = "label",
    drop: Sequence[str] = (),
    num_train: int | None = None,
    scaling: str = "coordinate",
    seed: int = 0,
) -> Split:
    """Read features and labels, and standardise the features by the training samples.

    Test samples are those of ``test_path``, a random share of ``path``, or the test arrays of an
    .npz file; without any of them the test set is empty. Classes are numbered in the order of their
    sorted labels, and are the mixture components.

    Args:
        path: the file, .npz, .csv or .parquet (:func:`~dd.data.sample_file.read_samples`).
        test_path: another file of the same features.
        test_share: share of the samples to test on, between 0 and 1.
        label: column of the labels in a table.
        drop: columns of a table to leave out.
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
    train, test = read_samples(path, label, drop)
    train, test = _tested(train, test, test_path, test_share, label=label, drop=drop, seed=seed)
    asked = sample_count("num_train", num_train, len(train.labels), "samples", REMEDY)
    order = torch.randperm(len(train.labels), generator=generator(seed, "data/subset/num_train"))
    # All of them in the order of the file.
    train = _rows(train, order[:asked].sort().values.numpy())
    targets, test_targets = _numbered(train, test)
    features = torch.from_numpy(train.features)
    empty = features[:0] if test is None else torch.from_numpy(test.features)
    inputs, test_inputs = standardise(features, empty, scaling)
    return Split(inputs, targets, targets.clone(), test_inputs, test_targets)


def _tested(
    train: Samples,
    test: Samples | None,
    test_path: str | os.PathLike[str] | None,
    test_share: float | None,
    *,
    label: str,
    drop: Sequence[str],
    seed: int,
) -> tuple[Samples, Samples | None]:
    """Training and test samples.

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
        test, apart = read_samples(test_path, label, drop)
        if apart is not None:
            raise ValueError(
                f"data.test_path={test_path} holds training and test samples of its own; give it "
                "as data.path, or name a file of features and labels alone"
            )
    if test_share is not None:
        train, test = _divided(train, test_share, seed)
    if test is not None and test.features.shape[1] != train.features.shape[1]:
        raise ValueError(
            f"{test.source} has {test.features.shape[1]} features a sample, {train.source} has "
            f"{train.features.shape[1]}"
        )
    return train, test


def _is(given: bool) -> str:
    return "given" if given else "not given"


def _divided(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Set a random share of the samples apart, of each class alike.

    Raises:
        ValueError: if the share is not between 0 and 1, or leaves nothing on one side.
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
    by_class = shuffled[np.argsort(samples.labels[shuffled], kind="stable")]
    # Every (total/count)-th, so that each class gives its share.
    chosen = np.zeros(total, dtype=bool)
    chosen[by_class[np.floor((np.arange(count) + 0.5) * total / count).astype(int)]] = True
    return _rows(samples, np.nonzero(~chosen)[0]), _rows(samples, np.nonzero(chosen)[0])


def _rows(samples: Samples, rows: npt.NDArray[np.int64]) -> Samples:
    return Samples(samples.source, samples.features[rows], samples.labels[rows])


def _numbered(train: Samples, test: Samples | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes numbered from 0, of training and test samples.

    Raises:
        ValueError: if the labels are no classes, or the test set has one that is not trained on.
    """
    labels = train.labels
    whole = labels.dtype.kind in "iubUS" or (
        labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
    )
    classes, targets = np.unique(labels, return_inverse=True)
    if not whole or 2 * len(classes) > len(labels):
        raise ValueError(
            f"{train.source}: labels must name classes, each of several samples, got "
            f"{len(classes)} different values of type {labels.dtype} in {len(labels)} samples"
        )
    if len(classes) < 2:
        raise ValueError(f"{train.source}: all labels are {classes[0]!s}; it takes two classes")
    if test is None:
        return torch.from_numpy(targets.astype(np.int64)), torch.zeros(0, dtype=torch.int64)
    unknown = sorted({str(each) for each in test.labels} - {str(each) for each in classes})
    if unknown or test.labels.dtype.kind not in _kinds(labels):
        raise ValueError(
            f"{test.source} has labels {', '.join(unknown[:5]) or test.labels.dtype}, which the "
            "training samples have not"
        )
    found = np.searchsorted(classes, test.labels)
    return (
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(found.astype(np.int64)),
    )


def _kinds(labels: npt.NDArray[np.generic]) -> str:
    return "US" if labels.dtype.kind in "US" else "iubf"
