"""What the run ``comparison`` shows in Weights & Biases: all optimizers at once."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dd.tracking.console import METHOD_COLUMNS
from dd.tracking.history import History
from dd.tracking.mark import mark

__all__ = ["compared", "comparison_figures"]

# Figures of ``summary.json`` by which runs are compared.
HEADLINE = ("reported_error", "reported_test_error", "reported_gap", "fit_seconds")


def comparison_figures(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of each optimizer by which experiments are compared, and its doubts.

    Args:
        summaries: figures of ``summary.json`` for each optimizer's name.
    """
    figures = {
        f"{name}/{key}": float(own[key]) for name, own in summaries.items() for key in HEADLINE
    }
    return figures | {
        f"{name}/doubts": list(own["doubts"]) for name, own in summaries.items() if mark(own)
    }


def compared(
    wandb: Any,
    history: History,
    summaries: Mapping[str, Mapping[str, Any]],
    figure: Path | None,
) -> dict[str, Any]:
    """Return charts of train and test curves of all optimizers, the picture, and the table.

    Args:
        wandb: the package.
        history: what was recorded; curves are medians over trials.
        summaries: figures of ``summary.json`` for each optimizer's name.
        figure: path of the picture, if there is one.
    """
    charts = {metric: _chart(wandb, history, metric) for metric in ("error", "loss")}
    pictures = {} if figure is None else {"curves": wandb.Image(str(figure))}
    return {**charts, **pictures, "methods": _table(wandb, summaries)}


def _chart(wandb: Any, history: History, metric: str) -> Any:
    xs: list[list[float]] = []
    ys: list[list[float]] = []
    keys: list[str] = []
    for name in history.optimizers:
        for side in ("train", "test"):
            steps, values = history.curves(name, f"{side}_{metric}")
            known = np.isfinite(values).all(0)
            if known.any():
                xs.append(steps[known].tolist())
                ys.append(np.median(values[:, known], axis=0).tolist())
                keys.append(f"{name} {side}")
    return wandb.plot.line_series(
        xs=xs, ys=ys, keys=keys, title=f"{metric}, train and test", xname="step"
    )


def _table(wandb: Any, summaries: Mapping[str, Mapping[str, Any]]) -> Any:
    columns = ["optimizer", *(label for label, _, _ in METHOD_COLUMNS)]
    rows = [_row(name, own) for name, own in summaries.items()]
    marks = [mark(own) for own in summaries.values()]
    if any(marks):
        columns.append("doubts")
        rows = [[*row, said or None] for row, said in zip(rows, marks, strict=True)]
    return wandb.Table(columns=columns, data=rows)


def _row(name: str, figures: Mapping[str, Any]) -> Sequence[Any]:
    values = (figures.get(key, math.nan) for _, key, _ in METHOD_COLUMNS)
    return [name, *(float(value) if math.isfinite(value) else None for value in values)]
