"""The images of CIFAR-10, read and downloaded by torchvision."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dd.data.download import FAILURES, one_line, socket_timeout
from dd.data.feature_file import LabelledArrays

__all__ = ["cifar10_images"]


def cifar10_images(root: Path, download: bool = True) -> LabelledArrays:
    """Return the official training and test images, uint8, shape (samples, 32, 32, 3).

    torchvision compares every file's checksum with the published one before it opens it, so what it
    unpickles is CIFAR-10 and nothing else.

    Args:
        root: folder that holds ``cifar-10-batches-py``, or will.
        download: fetch the data set where it is missing.

    Raises:
        FileNotFoundError: if it is missing and was not, or could not be, downloaded.
        RuntimeError: if its files are incomplete or damaged.
    """
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    if not folder.exists():
        _fetch(root, folder, download)
    train, train_labels = _read(root, folder, train=True)
    test, test_labels = _read(root, folder, train=False)
    return LabelledArrays(train, train_labels, test, test_labels)


def _read(root: Path, folder: Path, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import CIFAR10

    try:
        content = CIFAR10(str(root), train=train, download=False)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"CIFAR-10 in {folder} is incomplete or damaged: a file is missing or its checksum is "
            f"not the published one. Delete {folder} and run again to download it afresh, or point "
            "data.root=... at a whole copy."
        ) from error
    return content.data, np.asarray(content.targets, dtype=np.int64)


def _fetch(root: Path, folder: Path, download: bool) -> None:
    """Download the data set, or say why it is not there.

    Raises:
        FileNotFoundError: if it was not or could not be downloaded.
    """
    reason = "downloading is switched off"
    if download:
        try:
            return _download(root, folder)
        except FAILURES as error:
            reason = f"downloading it failed ({one_line(error)})"
    raise FileNotFoundError(
        f"CIFAR-10 is not in {folder} and {reason}. Point data.root=... at a folder that holds "
        f"{folder.name}, or data.path=... at an .npz file of features or images, or allow the "
        "download: data.download=true and a connection to the internet."
    )


def _download(root: Path, folder: Path) -> None:
    """Download beside the place of the data set and move it there only when it is whole."""
    from torchvision.datasets import CIFAR10

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch, socket_timeout():
        CIFAR10(scratch, download=True)
        os.replace(Path(scratch) / folder.name, folder)
