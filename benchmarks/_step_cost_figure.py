"""The picture of ``step_cost.py``: how the cost of a step depends on each of its sizes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dd.support.files import replacing
from dd.tracking.figures import DOTS_PER_INCH

COLOURS = {"isotropic": "#0072B2", "12 bins": "#D55E00", "fitted": "#009E73"}
BASE = {"n": 20_000, "d": 1024, "k": 64}

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture, whole or not at all."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(panels, ("k", "n", "d"), strict=True):
        _panel(axes, [row for row in rows if _varies(row, name)], name)
    panels[0].set_ylabel("time of a DD step over SGD's")
    panels[0].legend(title="noise model", fontsize=8, title_fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=DOTS_PER_INCH, format=path.suffix.removeprefix(".") or "png")


def _varies(row: Row, name: str) -> bool:
    """Whether a row differs from the base in one size at most."""
    plain = (row["batch"], row["curvature"], row["rule"]) == (None, "stein", "SGD")
    return plain and all(row[other] == BASE[other] for other in BASE if other != name)


def _panel(axes: Axes, rows: list[Row], name: str) -> None:
    for noise, colour in COLOURS.items():
        some = sorted((row for row in rows if row["noise"] == noise), key=lambda row: row[name])
        if not some:
            continue
        ratios = [row["ratio"] for row in some]
        below = [row["ratio"] - row["ratio_quartiles"][0] for row in some]
        above = [row["ratio_quartiles"][1] - row["ratio"] for row in some]
        bins = f" ({some[0]['bins']})" if noise != "isotropic" else ""
        axes.errorbar(
            [row[name] for row in some],
            ratios,
            [below, above],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{noise}{bins}",
        )
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    others = ", ".join(f"{other} = {value}" for other, value in BASE.items() if other != name)
    axes.set(xscale="log", xlabel=name, title=f"{others}, full batch")
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
