"""Predicted curves in a run folder, written and read back."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dd.support.files import read_rows, replacing
from dd.theory.state_evolution import StateEvolution
from dd.tracking.history import Array

__all__ = ["COLUMNS", "read_theory", "write_theory"]


COLUMNS = ("optimizer", "step", "loss", "loss_standard_error", "error", "error_standard_error")


def write_theory(theory: Mapping[str, StateEvolution], path: Path) -> None:
    """Write predicted curves, of :data:`COLUMNS`, whole or not at all."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, found in theory.items():
            curves = (
                found.steps,
                found.loss.mean,
                found.loss.standard_error,
                found.error.mean,
                found.error.standard_error,
            )
            rows = zip(*(curve.tolist() for curve in curves), strict=True)
            writer.writerows((name, *row) for row in rows)


def read_theory(path: Path) -> dict[str, dict[str, tuple[Array, Array]]]:
    """Read what :func:`write_theory` wrote.

    Returns:
        For the name of each optimizer, and "error" and "loss", steps and values, each of shape
        (T,).

    Raises:
        ValueError: if the file is not of that form.
    """
    rows = read_rows(path, COLUMNS, _predicted_row)
    found = {}
    for name in dict.fromkeys(name for name, *_ in rows):
        steps, loss, error = np.array([row[1:] for row in rows if row[0] == name]).T
        found[name] = {"error": (steps, error), "loss": (steps, loss)}
    return found


def _predicted_row(cells: Sequence[str]) -> tuple[str, float, float, float]:
    name, step, loss, _, error, _ = cells
    return name, float(step), float(loss), float(error)
