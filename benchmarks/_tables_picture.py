"""The picture of ``benchmarks/tables.py``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _tables_methods import LABELS
from _tables_summary import NEAR
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dd.support.files import replacing
from dd.tracking.figures import DOTS_PER_INCH

STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.markersize": 4,
}
# Okabe-Ito, as in dd.tracking.figures.
COLOURS = {
    "gd": "#D55E00",
    "cv5": "#009E73",
    "dd_none": "#E69F00",
    "dd_auto": "#CC79A7",
    "dd": "#0072B2",
}
ZOOM = 0.06

Line = Mapping[str, Any]


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw the mean gap of every table and method into a .png file, and what is near 0 larger.

    Args:
        found: one a table and method, as :func:`_tables_summary.lines` returns them.
        path: of the picture.
    """
    methods = [name for name in LABELS if any(line["method"] == name for line in found)]
    places = {name: place for place, name in enumerate(_sorted_tables(found, methods))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 1.2 + 0.19 * len(places)), layout="constrained")
        FigureCanvasAgg(figure)
        whole, near = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
        for axes in (whole, near):
            axes.axvspan(-NEAR, NEAR, color="grey", alpha=0.2, linewidth=0)
            axes.axvline(0, color="grey", linewidth=0.8)
            for place, method in enumerate(methods):
                shift = 0.5 * ((place + 0.5) / len(methods) - 0.5)
                _points(axes, [line for line in found if line["method"] == method], places, shift)
            axes.set_xlabel("reported − test error")
        whole.set_title("all gaps")
        near.set_title(f"the same, within ±{ZOOM}")
        near.set_xlim(-ZOOM, ZOOM)
        whole.set_yticks(list(places.values()), list(places))
        whole.set_ylim(len(places) - 0.5, -0.5)
        figure.legend(
            handles=_handles(methods),
            loc="outside lower center",
            ncols=4 if len(methods) < 4 else 3,
            frameon=False,
        )
        with replacing(path) as scratch:
            figure.savefig(scratch, format="png", dpi=DOTS_PER_INCH)


def _sorted_tables(found: Sequence[Line], methods: Sequence[str]) -> list[str]:
    """The tables by the gap of the first method that has them."""
    gaps: dict[str, float] = {}
    for method in methods:
        for line in found:
            if line["method"] == method:
                gaps.setdefault(line["table"], line["gap"])
    return sorted(gaps, key=lambda name: gaps[name])


def _points(axes: Axes, lines: Sequence[Line], places: Mapping[str, int], shift: float) -> None:
    for line in lines:
        colour = COLOURS[line["method"]]
        axes.errorbar(
            line["gap"],
            places[line["table"]] + shift,
            xerr=2 * line["error"],
            fmt="o",
            color=colour,
            markerfacecolor="white" if line["warns"] else colour,
            elinewidth=1.0,
        )


def _handles(methods: Sequence[str]) -> list[Line2D]:
    style = {"linestyle": "", "marker": "o"}
    known = [Line2D([], [], color=COLOURS[name], label=LABELS[name], **style) for name in methods]
    hollow = Line2D([], [], color="grey", markerfacecolor="white", label="warned", **style)
    return [*known, hollow]
