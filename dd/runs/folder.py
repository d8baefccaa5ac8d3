"""What a run has left in its folder, read back."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dd.runs.fit import Fit, SelectionRow
from dd.runs.results import Results
from dd.runs.theory_file import read_theory
from dd.support.files import read_rows
from dd.tracking.history import COLUMNS, Array, History, Record

__all__ = ["RunFolder", "read_run"]

SELECTION_COLUMNS = tuple(column.name for column in fields(SelectionRow))


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run.

    Attributes:
        path: of the folder.
        config: content of ``config.yaml``.
        optimizers: figures of ``summary.json`` for each optimizer's name; what was not finite is
            None.
        provenance: what stands beside them there: seed, device, versions, notes, failures.
        results: what the run had found.
        theory: for each optimizer that was predicted, and "error" and "loss", steps and values,
            each of shape (steps,).
    """

    path: Path
    config: DictConfig
    optimizers: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    results: Results
    theory: Mapping[str, Mapping[str, tuple[Array, Array]]]

    @property
    def history(self) -> History:
        """Every record."""
        return self.results.history


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
    records = read_rows(path / "history.csv", COLUMNS, _record)
    if not records:
        raise ValueError(f"{path / 'history.csv'} holds no records")
    history = History(records)
    names = history.optimizers
    missing = [name for name in names if not isinstance(summary.get(name), dict)]
    if missing:
        raise ValueError(
            f"{path / 'summary.json'} lacks {', '.join(missing)}, which history.csv has; they are "
            "not of one run"
        )
    optimizers = {name: summary[name] for name in names}
    provenance = {key: value for key, value in summary.items() if key not in optimizers}
    results = _results(path, history, optimizers, provenance)
    predicted = path / "state_evolution.csv"
    theory = read_theory(predicted) if predicted.is_file() else {}
    return RunFolder(path, config, optimizers, provenance, results, theory)


def _results(
    path: Path,
    history: History,
    optimizers: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> Results:
    fits: dict[tuple[str, int], Fit] = {}
    doubts: dict[tuple[str, int], tuple[str, ...]] = {}
    for name, figures in optimizers.items():
        trials, found = history.trials(name), figures.get("per_trial", [figures])
        if len(trials) != len(found):
            raise ValueError(
                f"{path / 'summary.json'} has {len(found)} trials of {name} and history.csv "
                f"{len(trials)}; they are not of one run"
            )
        fits |= {
            (name, trial): _fit(own)
            for trial, own in zip(trials, found, strict=True)
            if own.get("samples") is not None
        }
        for trial, own in zip(trials, found, strict=True):
            _require_same_state(path, history.select(name, trial)[-1], own)
        doubts |= {
            (name, trial): tuple(own["doubts"])
            for trial, own in zip(trials, found, strict=True)
            if own.get("doubts")
        }
    history.completed.update(fits)
    chosen = path / "selection.csv"
    return Results(
        history,
        list(provenance.get("failures", [])),
        list(provenance.get("notes", [])),
        dict(provenance.get("noise", {})),
        fits,
        read_rows(chosen, SELECTION_COLUMNS, _selection_row) if chosen.is_file() else [],
        doubts=doubts,
    )


def _require_same_state(path: Path, last: Record, figures: Mapping[str, Any]) -> None:
    """Check that a summary is of the last record that the history has.

    Raises:
        ValueError: if it is of an earlier or a later state.
    """
    steps = figures.get("steps", last.step)
    if steps != last.step:
        raise ValueError(
            f"{path / 'history.csv'} goes to step {last.step} of {last.optimizer}, trial "
            f"{last.trial + 1}, and {path / 'summary.json'} to step {steps}: the run was killed "
            f"between the two, or is going on. python -m dd resume={path} brings it to its end"
        )


def _fit(figures: Mapping[str, Any]) -> Fit:
    """What a completed optimizer and trial took, from its figures of ``summary.json``."""
    times = ("seconds", "steps_per_second", "fit_seconds", "passes", "samples")
    known = {key: math.nan if figures.get(key) is None else figures[key] for key in times}
    return Fit(
        **known,
        step=figures.get("reported_step"),
        error=figures.get("reported_error"),
        lr=figures.get("chosen_lr"),
        weight_decay=figures.get("chosen_weight_decay"),
    )


def _summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict) or "experiment" not in content:
        raise ValueError(f"{path} is not the summary of a run")
    return content


def _record(cells: Sequence[str]) -> Record:
    return Record(cells[0], int(cells[1]), int(cells[2]), *map(float, cells[3:]))


def _selection_row(cells: Sequence[str]) -> SelectionRow:
    name, trial, lr, weight_decay, step, *found = cells
    loss, error = map(float, found)
    return SelectionRow(name, int(trial), float(lr), float(weight_decay), int(step), loss, error)
