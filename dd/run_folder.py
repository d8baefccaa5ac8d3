"""What a run has left in its folder, read back."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dd.tracking import COLUMNS, History, Record

__all__ = ["RunFolder", "read_run"]


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run.

    Attributes:
        path: of the folder.
        config: content of ``config.yaml``.
        optimizers: figures of ``summary.json`` for each optimizer's name; what was not finite is
            None.
        provenance: what stands beside them there: seed, device, versions, notes, failures.
        history: every record.
    """

    path: Path
    config: DictConfig
    optimizers: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    history: History


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """Read a run folder.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file that runs write.
        ValueError: if a file is not of the form that runs write.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")
    for name in ("config.yaml", "summary.json", "history.csv"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}, so it is no folder of a run that has ended; run folders "
                "are outputs/<experiment>/<date>_<time>_<seed>"
            )
    config = OmegaConf.load(path / "config.yaml")
    if not isinstance(config, DictConfig) or "name" not in config:
        raise ValueError(f"{path / 'config.yaml'} is not the configuration of a run")
    summary = _summary(path / "summary.json")
    history = _history(path / "history.csv")
    names = history.optimizers
    missing = [name for name in names if not isinstance(summary.get(name), dict)]
    if missing:
        raise ValueError(
            f"{path / 'summary.json'} lacks {', '.join(missing)}, which history.csv has; they are "
            "not of one run"
        )
    optimizers = {name: summary[name] for name in names}
    provenance = {key: value for key, value in summary.items() if key not in optimizers}
    return RunFolder(path, config, optimizers, provenance, history)


def _summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict) or "experiment" not in content:
        raise ValueError(f"{path} is not the summary of a run")
    return content


def _history(path: Path) -> History:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS)}, got {', '.join(header)}"
            )
        try:
            records = [
                Record(row[0], int(row[1]), int(row[2]), *map(float, row[3:])) for row in reader
            ]
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged in line {reader.line_num} ({error})") from error
    if not records:
        raise ValueError(f"{path} holds no records")
    return History(records)
