"""Goes on with an interrupted run in its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dd.experiments.checkpoint import read_checkpoint
from dd.experiments.experiment import Experiment

__all__ = ["named_folder", "resumed"]

# What does not change what is computed.
FREE = ("tracking.progress", "tracking.report", "tracking.wandb.mode")


def named_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder that ``resume=`` names on a command line, or None."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "resume" and value.strip("'\"") not in {"", "null"}:
            return Path(value.strip("'\""))
    return None


def resumed(folder: Path, arguments: Sequence[str]) -> Experiment:
    """Return the interrupted experiment of a folder, ready to go on from its last checkpoint.

    Args:
        folder: of the run.
        arguments: the command line, ``resume=`` included.

    Raises:
        FileNotFoundError: if there is no such run, or it has no checkpoint.
        ValueError: if the run is finished, its checkpoint or configuration cannot be used, or the
            command line asks for other settings.
    """
    free = [a for a in arguments if a.lstrip("+").partition("=")[0] != "resume"]
    for argument in free:
        if argument.partition("=")[0] not in FREE:
            raise ValueError(
                f"resume= takes all settings from the folder's config.yaml; {argument} cannot go "
                f"with it, only {', '.join(FREE)} can"
            )
    if len(free) + 1 < len(arguments):
        raise ValueError("resume= takes one folder")
    config = _config(folder)
    _require_unfinished(folder)
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no checkpoint.pt: its run ended before the first one. Start it anew "
            "with the settings of its config.yaml"
        )
    kept = read_checkpoint(path)
    config.merge_with_dotlist(free)
    _require_matching(config, kept, folder)
    return Experiment(config, folder, kept)


def _config(folder: Path) -> DictConfig:
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(f"resume={folder}: there is no such folder")
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: there is no config.yaml, so it is no run folder")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig) or "tracking" not in config:
        raise ValueError(f"{path} is not the configuration of a run")
    return config


def _require_matching(config: DictConfig, kept: Mapping[str, Any], folder: Path) -> None:
    if kept["trial"] >= config.trials or kept["optimizer"] not in config.optimizers:
        raise ValueError(
            f"{folder / 'config.yaml'} does not name optimizer {kept['optimizer']}, trial "
            f"{kept['trial'] + 1}, at which the run was interrupted; it must not be edited"
        )


def _require_unfinished(folder: Path) -> None:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Written at the end, for the eye only.
        return
    if isinstance(summary, dict) and summary.get("finished"):
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume")
