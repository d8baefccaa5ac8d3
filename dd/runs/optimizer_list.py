"""Which optimizers of a configuration a run trains."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from dd.optimizer import DecoupledDescent

__all__ = [
    "AUTO",
    "OURS",
    "is_decoupled",
    "is_tracked",
    "known_optimizers",
    "requested_optimizers",
    "resolve_optimizers",
]

AUTO = "auto"

# What optimizers=auto trains, where it can be.
USUAL = ("gd", "dd", "dd_auto")

# Settings of an optimizer that are the experiment's and not its own.
OURS = ("name", "batch_size", "selection", "decouple")

# Packages of optimizers that come with no extra but their own, and how to get them.
OPTIONAL = {"schedulefree": "pip install schedulefree"}

_WHOLE = "it chooses every step on the loss of all training samples"


def known_optimizers(config: DictConfig) -> dict[str, DictConfig]:
    """Return the settings of every optimizer by its name."""
    # What optimizer.* overrides replaces the default settings of the same name.
    return {**config.available, config.optimizer.name: config.optimizer}


def requested_optimizers(config: DictConfig) -> list[Any]:
    """Return the names of ``optimizers``; "auto" is the usual ones and that of ``optimizer``."""
    if config.optimizers != AUTO:
        return list(config.optimizers) if OmegaConf.is_list(config.optimizers) else []
    known = known_optimizers(config)
    return [name for name in known if name in USUAL or name == config.optimizer.name]


def is_decoupled(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer of these settings is decoupled descent, which can choose its steps."""
    try:
        kind = hydra.utils.get_object(settings["_target_"])
    except (ImportError, KeyError, TypeError, ValueError):
        # Building it will say what is wrong.
        return False
    return isinstance(kind, type) and issubclass(kind, DecoupledDescent)


def is_tracked(settings: Mapping[str, Any]) -> bool:
    """Whether the training error of an optimizer of these settings estimates its test error."""
    return settings.get("decouple") is not None or is_decoupled(settings)


def resolve_optimizers(config: DictConfig, processes: int) -> tuple[DictConfig, list[str]]:
    """Settle which optimizers a valid configuration trains.

    Args:
        config: its ``optimizers`` is a list, or "auto" for those of the usual ones that can be
            trained.
        processes: that share the samples of every update.

    Returns:
        A copy whose ``optimizers`` is a list, and a sentence on each that was left out.

    Raises:
        ValueError: if an optimizer was asked for by name that cannot be trained.
    """
    known = known_optimizers(config)
    everything = config.optimizers == AUTO
    names, left_out = [], []
    for name in requested_optimizers(config):
        obstacle = _obstacle(config, known[name], processes)
        if obstacle is None:
            names.append(name)
        elif everything and name != config.optimizer.name:
            left_out.append(f"{name} was left out: {obstacle}")
        else:
            raise ValueError(
                f"optimizer {name} cannot be trained: {obstacle}; or train others, such as "
                "optimizer=dd optimizers=[gd,dd]"
            )
    copy = config.copy()
    copy.optimizers = names
    return copy, left_out


def _obstacle(config: DictConfig, settings: DictConfig, processes: int) -> str | None:
    """Why an optimizer cannot be trained, and how it could."""
    if processes > 1 and ("selection" in settings or settings.get("batch_size") is not None):
        return f"batches and candidates of its own need one process; there are {processes}"
    missing = _missing_package(settings)
    if missing is not None:
        return f"it needs the package {missing}, which is not installed: {OPTIONAL[missing]}"
    selection = settings.get("selection")
    tracked = selection is not None and selection.get("by") == "tracked"
    if tracked and not is_tracked(settings):
        return (
            "its training error is no estimate of the test error to choose by, as that of "
            "decoupled descent is; selection.by should be holdout or kfold"
        )
    if settings.get("lr") != AUTO:
        return None
    return _obstacle_to_auto(config, settings, processes)


def _missing_package(settings: DictConfig) -> str | None:
    package = str(settings.get("_target_")).partition(".")[0]
    is_there = package not in OPTIONAL or importlib.util.find_spec(package) is not None
    return None if is_there else package


def _obstacle_to_auto(config: DictConfig, settings: DictConfig, processes: int) -> str | None:
    """Why an optimizer that chooses its own steps cannot be trained, and how it could."""
    if "selection" in settings:
        return "lr: auto leaves no learning rate to select"
    batch_size = settings.get("batch_size", config.data.get("batch_size"))
    if batch_size is not None:
        return f"{_WHOLE}; data.batch_size={batch_size} should be null"
    if processes > 1:
        return f"{_WHOLE} in one process; there are {processes}"
    return None
