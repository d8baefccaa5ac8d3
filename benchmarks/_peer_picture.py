"""The picture of ``benchmarks/peers.py``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from dd.support.files import replacing
from dd.tracking.figures import DOTS_PER_INCH

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
}
TITLES = {
    "linear": "Linear, isotropic",
    "linear_anisotropic": "Linear, anisotropic",
    "linear_few": "Linear, n = d/2",
    "linear_few_decay": "Linear, n = d/2, decay",
    "ridge": "Ridge, at the optimum",
    "logistic": "Logistic, at the optimum",
    "network": "Two layers, XOR",
}
# Okabe-Ito, as in dd.tracking.figures. Solvers have open markers, what is no estimate a dashed
# line.
LINES: Mapping[str, dict[str, Any]] = {
    "gd": {"color": "#D55E00", "linestyle": "--", "marker": "o"},
    "gd_kfold": {"color": "#009E73", "marker": "s"},
    "gd_path": {"color": "#CC79A7", "marker": "D"},
    "gd_probed": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "solver": {"color": "#D55E00", "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "solver_kfold": {"color": "#009E73", "marker": "s", "markerfacecolor": "white"},
    "solver_randalo": {"color": "#E69F00", "marker": "^", "markerfacecolor": "white"},
    "solver_loo": {"color": "black", "marker": "v", "markerfacecolor": "white"},
    "dd": {"color": "#0072B2", "marker": "o", "linewidth": 2.2},
    "dd_isotropic": {"color": "#56B4E9", "marker": "o", "linestyle": ":"},
    "adamw": {"color": "#E69F00", "linestyle": "--", "marker": "P"},
    "dd_adamw": {"color": "black", "marker": "P"},
}

Row = Mapping[str, Any]


def draw(rows: Sequence[Row], labels: Mapping[str, str], path: Path) -> None:
    """Draw distance, time and memory over d, one column a study, into a .png file."""
    studies = [study for study in TITLES if any(row["study"] == study for row in rows)]
    methods = [name for name in labels if any(row["method"] == name for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 2.1 * len(studies), 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(3, len(studies), sharey="row", sharex="col", squeeze=False)
        handles: dict[str, Any] = {}
        for column, study in zip(grid.T, studies, strict=True):
            handles |= _column(column, [row for row in rows if row["study"] == study], methods)
            column[0].set_title(TITLES[study], weight="bold")
            column[-1].set_xlabel("dimension d")
        for axes, label in zip(
            grid[:, 0],
            ("|estimate − truth| in floors", "time, of GD's fit", "memory, of GD's fit"),
            strict=True,
        ):
            axes.set_ylabel(label)
        known = [name for name in methods if name in handles]
        figure.legend(
            [handles[name] for name in known],
            [labels[name] for name in known],
            loc="outside lower center",
            ncols=min(4, max(1, len(known))),
            frameon=False,
        )
        with replacing(path) as scratch:
            figure.savefig(scratch, format="png", dpi=DOTS_PER_INCH)


def _column(column: Sequence[Axes], rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Any]:
    pictured: Sequence[Callable[[Row], float | None]] = (
        lambda row: row["accuracy"] and row["accuracy"]["distance"] / row["accuracy"]["floor"],
        lambda row: row["cost"] and row["cost"]["time_ratio"],
        lambda row: row["cost"] and row["cost"]["memory_ratio"],
    )
    handles = {}
    for axes, value in zip(column, pictured, strict=True):
        for name in methods:
            points = [(row["d"], value(row)) for row in rows if row["method"] == name]
            points = [(d, found) for d, found in points if found is not None]
            if points:
                [handles[name]] = axes.plot(*zip(*points, strict=True), **LINES[name])
        axes.axhline(1, color="grey", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["d"] for row in rows})))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    return handles
