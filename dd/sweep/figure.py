"""The picture of a multirun."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dd.support.files import replacing
from dd.sweep.table import Sweep, SweepRow, settings_label
from dd.tracking.any_backend import any_backend
from dd.tracking.figures import DOTS_PER_INCH, LABELS, TEST_COLOUR, TRAIN_COLOUR

with any_backend():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

__all__ = ["draw"]

Array = npt.NDArray[np.float64]

# What is drawn of every row, and how.
SIDES = (
    ("test_error", "test", TEST_COLOUR, "o"),
    ("reported_error", "reported", TRAIN_COLOUR, "D"),
)
# A setting whose values span more than this is drawn on a logarithmic axis.
WIDE = 20.0
MOST_RANKED = 40


def draw(sweep: Sweep) -> Path:
    """Draw what optimizers report and what the test set says, and write ``sweep.png``.

    Over a single number that was swept, means over its seeds with their range; otherwise every
    combination of settings in a line of its own, the lowest reported error on top.

    Returns:
        Path of the picture.
    """
    rows = [row for row in sweep.rows if row.optimizer]
    keys = [key for key in sweep.keys if key != "seed"]
    names = list(dict.fromkeys(row.optimizer for row in rows)) or [""]
    numbers = _numbers(rows, keys[0]) if len(keys) == 1 else None
    labels = [_label(row, keys) for row in rows] if numbers is None else []
    width = 4.2 + 0.07 * max(map(len, labels), default=0)
    height = 1.6 + 0.28 * min(MOST_RANKED, len(set(labels))) if labels else 4.0
    figure = Figure(figsize=(0.8 + width * len(names), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=numbers is not None, squeeze=False)[0]
    top = 1.08 * max((v for row in rows for v in _drawn(row)), default=1.0) or 1.0
    for axes, name in zip(panels, names, strict=True):
        own = [row for row in rows if row.optimizer == name]
        if numbers is None:
            _ranked(axes, own, keys)
            axes.set_xlim(0, top)
        else:
            _over(axes, own, keys[0], numbers)
            axes.set_ylim(0, top)
        axes.set_title(LABELS.get(name, name), loc="left", weight="bold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(sweep.path.name)
    path = sweep.path / "sweep.png"
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DOTS_PER_INCH)
    return path


def _drawn(row: SweepRow) -> list[float]:
    values = [row.figures[column] for column, *_ in SIDES]
    return [value for value in values if math.isfinite(value)]


def _label(row: SweepRow, keys: Sequence[str]) -> str:
    return settings_label(row.job.overrides, keys) or "all seeds"


def _numbers(rows: Sequence[SweepRow], key: str) -> Mapping[str, float] | None:
    """Values of a setting as numbers; None where they are none, or only one."""
    try:
        values = {row.job.overrides[key]: float(row.job.overrides[key]) for row in rows}
    except (KeyError, ValueError):
        return None
    return values if len(values) > 1 and all(map(math.isfinite, values.values())) else None


def _over(axes: Axes, rows: Sequence[SweepRow], key: str, numbers: Mapping[str, float]) -> None:
    places = np.array(sorted(set(numbers.values())))
    for column, label, colour, marker in SIDES:
        values = [
            np.array([r.figures[column] for r in rows if numbers[r.job.overrides[key]] == place])
            for place in places
        ]
        known = [own[np.isfinite(own)] for own in values]
        there = np.array([len(own) > 0 for own in known])
        if not there.any():
            continue
        low, mean, high = (
            np.array([found(own) for own in known if len(own)])
            for found in (np.min, np.mean, np.max)
        )
        style = "-" if label == "test" else (0, (4, 2))
        axes.plot(places[there], mean, color=colour, linestyle=style, marker=marker, label=label)
        axes.fill_between(places[there], low, high, color=colour, alpha=0.2, linewidth=0)
    if places[0] > 0 and places[-1] / places[0] >= WIDE:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel("Error")


def _ranked(axes: Axes, rows: Sequence[SweepRow], keys: Sequence[str]) -> None:
    means: dict[str, dict[str, float]] = {}
    for (label,) in ((_label(row, keys),) for row in rows):
        own = [row for row in rows if _label(row, keys) == label]
        means.setdefault(
            label, {column: _mean([r.figures[column] for r in own]) for column, *_ in SIDES}
        )
    order = sorted(means, key=lambda label: _last(means[label]["reported_error"]))[:MOST_RANKED]
    heights = np.arange(len(order))
    for column, label, colour, marker in SIDES:
        values = [means[name][column] for name in order]
        axes.plot(values, heights, color=colour, linestyle="", marker=marker, label=label)
    axes.set_yticks(heights, order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("Error")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value
