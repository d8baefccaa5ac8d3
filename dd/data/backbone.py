"""Frozen features of images: what an image network passes to its classifier."""

import difflib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from rich.progress import track
from torch import Tensor, nn

from dd.data.download import FAILURES, one_line, socket_timeout
from dd.data.feature_cache import cached_features, digest
from dd.data.places import cache_root
from dd.data.seeding import generator
from dd.support.checks import check_count

__all__ = ["backbone_features"]

UNTRAINED = "none"

# A file that holds more than tensors, or nothing that torch saved, is refused as a bad pickle.
LOADING_FAILURES = (*FAILURES, pickle.UnpicklingError)


def backbone_features(
    images: Tensor,
    *,
    backbone: str = "resnet18",
    weights: str = "DEFAULT",
    resolution: int | None = None,
    seed: int = 0,
    download: bool = True,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Return what the backbone's last linear layer would take as input, for every image.

    Features are computed in evaluation mode, after the preprocessing that the weights come with,
    and kept on disk: a second call with the same backbone, weights, resolution and images reads
    them.

    Args:
        images: shape (n, 3, height, width), uint8, on the CPU.
        backbone: an image classifier of torchvision that ends in a linear layer.
        weights: name of its weights, such as ``"DEFAULT"`` or ``"IMAGENET1K_V1"``, or ``"none"``
            for random ones.
        resolution: pixels to which the shorter side of an image is resized and the whole square
            of which is kept; None is the size, and the cropped border, of the weights' own recipe.
        seed: of random weights; it has no part in trained ones.
        download: fetch weights that are not on disk.
        cache: folder of the kept features; None is ``features`` in the user's cache folder.
        device: where to compute.
        batch_size: images that go through the network at once.
        progress: show a progress bar.

    Returns:
        Features, shape (n, dimension), float32, on the CPU.

    Raises:
        OSError: if the features cannot be kept.
        RuntimeError: if the weights cannot be loaded, or the features are not finite.
        TypeError: if the images are not uint8.
        ValueError: if an argument is out of range or names nothing that torchvision has.
    """
    _check(images, resolution, batch_size)
    recipe = _recipe(backbone, weights)
    preprocess = _preprocessing(recipe, resolution)
    key = {
        "backbone": backbone,
        "weights": f"{UNTRAINED} {seed}" if weights == UNTRAINED else f"{recipe} {recipe.url}",
        "preprocessing": str(preprocess),
        "images": digest(images),
    }

    def compute() -> Tensor:
        trained = None if weights == UNTRAINED else _available(recipe, download, progress)
        network = _headless(backbone, trained, seed, **_size(backbone, trained, recipe)).to(device)
        label = f"{backbone} features"
        return _features(network, preprocess, images.split(batch_size), device, label, progress)

    folder = Path(cache).expanduser() if cache is not None else cache_root() / "features"
    return cached_features(folder, key, len(images), compute)


def _check(images: Tensor, resolution: int | None, batch_size: int) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, pixels from 0 to 255, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            f"images must have shape (n, 3, height, width), none of them zero, "
            f"got {tuple(images.shape)}"
        )
    check_count("batch_size", batch_size)
    if resolution is not None:
        check_count("resolution", resolution)


def _recipe(backbone: str, weights: str) -> Any:
    """Return torchvision's entry of the weights; random weights take the default's preprocessing.

    Raises:
        ValueError: if torchvision has no such classifier or no such weights for it.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if backbone not in known:
        near = difflib.get_close_matches(str(backbone), known, n=3) or ["resnet18", "resnet50"]
        raise ValueError(
            f"backbone must be an image classifier of torchvision, such as {', '.join(near)}; "
            f"got {backbone!r}"
        )
    available = models.get_model_weights(backbone)
    name = "DEFAULT" if weights == UNTRAINED else weights
    if name not in available.__members__:
        raise ValueError(
            f"weights of {backbone} must be one of {', '.join(available.__members__)}, or "
            f"{UNTRAINED} for random ones; got {weights!r}"
        )
    return available[name]


def _preprocessing(recipe: Any, resolution: int | None) -> nn.Module:
    size = {} if resolution is None else {"crop_size": resolution, "resize_size": resolution}
    preprocess: nn.Module = recipe.transforms(**size)
    return preprocess


def _available(recipe: Any, download: bool, progress: bool) -> Any:
    """Make sure that the weights are on disk and hold nothing but tensors.

    Raises:
        RuntimeError: if not.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(recipe.url).path).name
    reason = "downloading is switched off (data.download=false)"
    if download or path.is_file():
        try:
            with socket_timeout():
                recipe.get_state_dict(progress=progress, check_hash=True, weights_only=True)
        except LOADING_FAILURES as error:
            reason = one_line(error)
        else:
            return recipe
    raise RuntimeError(
        f"the weights {recipe} could not be loaded from {path} or {recipe.url}: {reason}. Put a "
        "whole copy there or delete a damaged one and connect to the internet, or give features "
        "in a file with data.path=..., or take random weights with data.weights=none."
    )


def _size(backbone: str, trained: Any, recipe: Any) -> dict[str, int]:
    """What an untrained vision transformer has to know of the images that its recipe makes."""
    if trained is not None or not backbone.startswith("vit_"):
        return {}
    return {"image_size": recipe.meta["min_size"][0]}


def _headless(backbone: str, weights: Any, seed: int, **settings: Any) -> nn.Module:
    """Return the network in evaluation mode, its last linear layer replaced by the identity.

    Args:
        backbone: name of the network.
        weights: torchvision's entry of them, or None for random ones.
        seed: of random weights.
        settings: what else the network is built with.

    Raises:
        ValueError: if its output is not that of a linear layer.
    """
    from torchvision import models

    # Random weights come from torch's own global stream, which is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "backbone").initial_seed())
        network: nn.Module = models.get_model(backbone, weights=weights, progress=False, **settings)
    name, last = [(n, m) for n, m in network.named_modules() if _has_own_weights(m)][-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"the last layer of {backbone} is a {type(last).__name__}, not a linear layer whose "
            "inputs could be its features; choose another backbone, such as resnet18"
        )
    network.set_submodule(name, nn.Identity())
    return network.eval()


def _has_own_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


@torch.no_grad()
def _features(
    network: nn.Module,
    preprocess: nn.Module,
    batches: Sequence[Tensor],
    device: torch.device | str,
    label: str,
    progress: bool,
) -> Tensor:
    """Return the network's outputs for all batches, on the CPU.

    Raises:
        AcceleratorError: if the device fails.
        OutOfMemoryError: if a batch does not fit on it.
        RuntimeError: if one is not finite.
        ValueError: if the network does not take images of this size.
    """
    try:
        outputs = [
            network(preprocess(batch.to(device))).float().cpu()
            for batch in track(batches, label, disable=not progress)
        ]
    # These are of the device, and no other resolution is a remedy.
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{label} cannot be computed ({one_line(error)}): resolution must be one that the "
            "backbone takes; null is that of its weights"
        ) from error
    features = torch.cat(outputs)
    if not bool(features.isfinite().all()):
        raise RuntimeError(f"{label} are not finite; choose other weights or another backbone")
    return features
