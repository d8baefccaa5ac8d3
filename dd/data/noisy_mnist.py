"""MNIST digits with Gaussian pixel noise."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dd.data.counts import sample_count
from dd.data.download import FAILURES, one_line, socket_timeout
from dd.data.places import data_root
from dd.data.seeding import generator
from dd.data.split import Split
from dd.support.checks import check_number

__all__ = ["noisy_mnist"]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# What torchvision's reader raises on a file that is cut short or is no IDX file at all.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def noisy_mnist(
    *,
    root: str | os.PathLike[str] | None = None,
    num_train: int | None = 2000,
    num_test: int | None = 5000,
    noise: float = 0.5,
    pooled: bool = True,
    seed: int = 0,
    download: bool = True,
) -> Split:
    """Draw random MNIST digits and blur them with Gaussian pixel noise.

    Pixels in [0, 1] are centred by the mean image of the training digits drawn, noise is added to
    training and test digits, and both are divided by the one number that gives the noisy training
    inputs unit mean square. Components are the classes.

    Args:
        root: folder that holds ``MNIST/raw``; None is the environment variable DD_DATA, else
            the user's cache folder.
        num_train: training digits; None takes all there are.
        num_test: test digits; None takes all that are left.
        noise: standard deviation of the noise in each pixel, before the scaling.
        pooled: draw training and test digits from one pool of all digits, so that they have one
            distribution. The writers of the official training and test sets are not the same;
            False keeps to that split.
        seed: non-negative integer.
        download: fetch the data set into ``root`` where it is missing.

    Raises:
        FileNotFoundError: if the data set is missing and was not, or could not be, downloaded.
        RuntimeError: if its files are incomplete or damaged.
        ValueError: if an argument is out of range or more digits are asked for than exist.

    Example:
        >>> from dd.data import noisy_mnist
        >>> split = noisy_mnist(num_train=2000, num_test=5000)  # doctest: +SKIP
        >>> noisy_mnist(root="no_digits_here", download=False)
        Traceback (most recent call last):
            ...
        FileNotFoundError: ...
    """
    check_number("noise", noise)
    images, labels, official = _load(data_root(root), download)
    train, test = _draw(len(images), None if pooled else official, num_train, num_test, seed)
    train_inputs, test_inputs = _preprocess(images[train], images[test], noise, seed)
    return Split(
        train_inputs=train_inputs,
        train_targets=labels[train],
        train_components=labels[train].clone(),
        test_inputs=test_inputs,
        test_targets=labels[test],
    )


def _draw(
    total: int, official: int | None, num_train: int | None, num_test: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the positions of the training and of the test digits.

    With ``official`` given, the first that many digits are for training and the others for testing.
    """
    order = torch.randperm(total, generator=generator(seed, "data/subset"))
    if official is None:
        num_train = _count("num_train", num_train, total)
        num_test = _count("num_test", num_test, total - num_train)
        return order[:num_train], order[num_train : num_train + num_test]
    num_train = _count("num_train", num_train, official)
    num_test = _count("num_test", num_test, total - official)
    return order[order < official][:num_train], order[order >= official][:num_test]


def _count(name: str, asked: int | None, available: int) -> int:
    return sample_count(
        name, asked, available, "digits", "point data.root at a larger copy of MNIST"
    )


def _preprocess(train: Tensor, test: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return float32 rows from uint8 images (n, 28, 28).

    Raises:
        ValueError: if there is nothing to scale.
    """
    train, test = train.flatten(1).float() / 255, test.flatten(1).float() / 255
    mean = train.mean(0)
    train = train - mean + noise * torch.randn(train.shape, generator=generator(seed, "data/train"))
    test = test - mean + noise * torch.randn(test.shape, generator=generator(seed, "data/test"))
    scale = train.square().mean().sqrt()
    if not scale > 0:
        raise ValueError(
            "the training inputs are all zero and cannot be scaled to unit mean square; "
            "raise num_train or noise"
        )
    return train / scale, test / scale


def _load(root: Path, download: bool) -> tuple[Tensor, Tensor, int]:
    """Return images (N, 28, 28), labels (N,) and how many of them the training files hold.

    Raises:
        RuntimeError: if some of the files are missing, or one is damaged.
    """
    folder = root / "MNIST" / "raw"
    present = [name for name in FILES if (folder / name).is_file()]
    if not present:
        _fetch(root, download)
    elif len(present) < len(FILES):
        missing = ", ".join(name for name in FILES if name not in present)
        raise RuntimeError(f"MNIST in {folder} is incomplete: {missing} missing. {_mend(folder)}")
    train, train_labels = _read_pair(folder, *FILES[:2])
    test, test_labels = _read_pair(folder, *FILES[2:])
    return torch.cat([train, test]), torch.cat([train_labels, test_labels]), len(train)


def _read_pair(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    images, labels = _read(folder / images_name), _read(folder / labels_name)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise _damaged(folder / images_name, f"expected 28 × 28 images, got {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise _damaged(
            folder / labels_name,
            f"expected {len(images)} labels, one an image, got {tuple(labels.shape)}",
        )
    if int(labels.max()) > 9:
        raise _damaged(folder / labels_name, f"expected labels 0 to 9, got {int(labels.max())}")
    return images, labels


def _read(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    read = read_image_file if "images" in path.name else read_label_file
    try:
        tensor: Tensor = read(str(path))
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else "the header is not that of IDX"
        raise _damaged(path, reason) from error
    return tensor


def _damaged(path: Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{path} is damaged or is not a file of MNIST ({reason}). {_mend(path.parent)}"
    )


def _mend(folder: Path) -> str:
    return (
        f"Delete {folder} and run again to download it afresh, or point data.root=... or the "
        "environment variable DD_DATA at a whole copy."
    )


def _fetch(root: Path, download: bool) -> None:
    """Download the data set, or say why it is not there.

    Raises:
        FileNotFoundError: if it was not or could not be downloaded.
    """
    reason = "downloading is switched off"
    if download:
        try:
            return _download(root)
        except FAILURES as error:
            reason = f"downloading it failed ({one_line(error)})"
    raise FileNotFoundError(
        f"MNIST is not in {root / 'MNIST' / 'raw'} (looked for {', '.join(FILES)}) and {reason}. "
        "Point data.root=... or the environment variable DD_DATA at a folder that holds "
        "MNIST/raw, or allow the download: data.download=true and a connection to the internet."
    )


def _download(root: Path) -> None:
    """Download beside the place of the data set and move it there only when it is whole."""
    from torchvision.datasets import MNIST

    target = root / "MNIST" / "raw"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch, socket_timeout():
        MNIST(root=scratch, download=True)
        fresh = Path(scratch) / "MNIST" / "raw"
        if target.is_dir():
            for name in FILES:
                os.replace(fresh / name, target / name)
        else:
            shutil.move(fresh, target)
