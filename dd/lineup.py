"""Which optimizers of a configuration a run trains."""

from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig

from dd.optimizer import DecoupledDescent

__all__ = ["AUTO", "known_optimizers", "lined_up", "takes_auto_rate"]

AUTO = "auto"

_REASON = "it chooses every step on the loss of all training samples, which does not go with"


def known_optimizers(config: DictConfig) -> dict[str, DictConfig]:
    """Return the settings of every optimizer by its name."""
    # What optimizer.* overrides replaces the default settings of the same name.
    return {**config.available, config.optimizer.name: config.optimizer}


def takes_auto_rate(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer of these settings can choose its own steps."""
    try:
        kind = hydra.utils.get_class(settings["_target_"])
    except (ImportError, KeyError, TypeError, ValueError):
        # Building it will say what is wrong.
        return False
    return issubclass(kind, DecoupledDescent)


def lined_up(config: DictConfig, processes: int) -> tuple[DictConfig, list[str]]:
    """Settle which optimizers a valid configuration trains.

    Args:
        config: its ``optimizers`` is a list, or "auto" for all that can be trained.
        processes: that share the samples of every update.

    Returns:
        A copy whose ``optimizers`` is a list, and a sentence on those that were left out, if any.

    Raises:
        ValueError: if an optimizer was asked for by name that cannot be trained.
    """
    obstacle = _obstacle(config, processes)
    known = known_optimizers(config)
    unable = [name for name in known if obstacle and known[name].get("lr") == AUTO]
    everything = config.optimizers == AUTO
    names = list(known) if everything else list(config.optimizers)
    for name in unable:
        if name in names and not (everything and name != config.optimizer.name):
            able = ",".join(each for each in names if each not in unable) or "dd"
            raise ValueError(
                f"optimizer {name} cannot be trained with {obstacle}: its lr=auto chooses every "
                "step on the loss of all training samples, in one process. Use "
                f"data.batch_size=null and one process, or optimizers=[{able}] without {name}"
            )
    copy = config.copy()
    copy.optimizers = [name for name in names if name not in unable]
    left_out = [name for name in names if name in unable]
    return copy, [f"{name} was left out: {_REASON} {obstacle}" for name in left_out]


def _obstacle(config: DictConfig, processes: int) -> str | None:
    """What an optimizer that chooses its own steps cannot be trained with."""
    if config.data.get("batch_size") is not None:
        return f"data.batch_size={config.data.batch_size}"
    return f"{processes} processes" if processes > 1 else None
