"""Goes on with an interrupted run in its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dd.experiments.checkpoint import read_checkpoint
from dd.experiments.experiment import Experiment
from dd.experiments.origin import changed_settings

__all__ = ["named_folder", "resumed"]

# What does not change what is computed.
FREE = ("tracking.progress", "tracking.report", "tracking.wandb.mode")
# Where the data are, which are held against those that the run began with, and where to compute.
PLACES = ("path", "test_path", "root", "cache")
MOVABLE = (*(f"data.{place}" for place in PLACES), "data.download", "device")


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
        if argument.partition("=")[0] not in (*FREE, *MOVABLE):
            raise ValueError(
                f"resume= takes all settings from the folder's config.yaml; {argument} cannot go "
                f"with it, only {', '.join((*FREE, *MOVABLE))} can"
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
    _require_unedited(config, kept["origin"], folder)
    _follow_paths(config, Path(kept["origin"]["directory"]))
    config.merge_with_dotlist(free)
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


def _require_unedited(config: DictConfig, origin: Mapping[str, Any], folder: Path) -> None:
    changed = changed_settings(origin, config)
    if changed:
        shown = "; ".join([*changed[:4], *(["..."] if len(changed) > 4 else [])])
        raise ValueError(
            f"{folder / 'config.yaml'} and the checkpoint beside it are not of one run: {shown}. A "
            "run goes on with the settings that it began with: put them back, or start a new run"
        )


def _follow_paths(config: DictConfig, directory: Path) -> None:
    """Look for relative paths where the run began; where they are not there, in this directory."""
    for place in PLACES:
        path = config.data.get(place)
        if isinstance(path, str) and not path.startswith("~") and (directory / path).exists():
            config.data[place] = str(directory / path)


def _require_unfinished(folder: Path) -> None:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Written at the end, for the eye only.
        return
    if isinstance(summary, dict) and summary.get("finished"):
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume")
