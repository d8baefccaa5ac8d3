"""Features on disk under a key of everything that they depend on."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dd.data.npz import NpzError, NpzReader
from dd.support.files import replacing

__all__ = ["cached_features", "digest"]


def digest(images: Tensor) -> str:
    """Return a hash of the shape, data type and values of images."""
    content = np.ascontiguousarray(images.numpy())
    header = f"{content.dtype.str} {content.shape} ".encode()
    return hashlib.sha256(header + content.tobytes()).hexdigest()


def cached_features(
    folder: Path, key: Mapping[str, Any], samples: int, compute: Callable[[], Tensor]
) -> Tensor:
    """Return the features kept under a key, computed and kept first where there are none.

    A file is written whole or not at all, and one that has been damaged since is computed again.

    Args:
        folder: where the files are kept; made if need be.
        key: everything that the features depend on, in values that JSON can hold; its entry
            ``"backbone"`` begins the file's name.
        samples: how many rows there must be.
        compute: returns the features, shape (samples, dimension), float32.

    Raises:
        OSError: if the folder cannot be written to; nothing is computed then.
    """
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{key['backbone']}-{name}.npz"
    kept = _read(path, samples)
    return _compute_and_keep(path, key, compute) if kept is None else kept


def _read(path: Path, samples: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with NpzReader(path) as reader:
            features = reader.read("features")
        if features.dtype != np.float32 or features.ndim != 2 or len(features) != samples:
            raise NpzError(f"it holds {features.dtype} of shape {features.shape}")
    except NpzError as error:
        warnings.warn(f"{path} is damaged ({error}): computing the features again", stacklevel=2)
        return None
    return torch.from_numpy(np.array(features))


def _compute_and_keep(path: Path, key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened before the computation, so that a full hour is not spent on what cannot be kept.
        with replacing(path) as scratch, scratch.open("wb") as file:
            features = compute()
            np.savez(file, features=features.numpy(), key=np.array(json.dumps(dict(key))))
    except PermissionError as error:
        raise PermissionError(
            f"features cannot be kept in {path.parent} ({error}); choose another folder with "
            "data.cache=..."
        ) from error
    return features
