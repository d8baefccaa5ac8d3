"""The interactive curves of a report, as figures for plotly.js."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dd.runs.folder import RunFolder
from dd.tracking.any_backend import any_backend
from dd.tracking.figures import ROWS, quartiles, top
from dd.tracking.history import Array, History

with any_backend():
    import matplotlib
    from matplotlib.colors import to_hex

__all__ = [
    "HIDDEN",
    "KINDS",
    "SHAPES",
    "Chart",
    "Look",
    "Series",
    "chart",
    "curves_of",
    "styles_of_optimizers",
    "styles_of_runs",
]

# What a line of each kind looks like: lengths of its dashes and gaps.
KINDS = {
    "test": "",
    "train": "7,4",
    "uncorrected": "18,6",
    "validation": "9,3,2,3",
    "theory": "2,3",
}
# Shown only when asked for.
HIDDEN = ("uncorrected",)

# The picture's colours, then three more. Every one has a contrast of 3 on the light and the dark
# page, and any two differ in OKLab by 0.07 with any colour vision.
OWN = {"dd": "#D55E00", "dd_auto": "#009E73", "gd": "#0072B2"}
OTHERS = ("#CC79A7", "#A02BE0", "#96504F", "#6F7480")
# Markers tell lines apart without colour as well: plotly's name of each, its outline in a square
# of 12 for the legend.
SHAPES = {
    "circle": "M6 1a5 5 0 0 1 0 10a5 5 0 0 1 0-10z",
    "square": "M1.5 1.5h9v9h-9z",
    "diamond": "M6 0l6 6l-6 6l-6-6z",
    "triangle-up": "M6 1l5.5 10h-11z",
    "x": "M3 .5l3 3l3-3l2.5 2.5l-3 3l3 3l-2.5 2.5l-3-3l-3 3l-2.5-2.5l3-3l-3-3z",
    "cross": "M4 .5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "star": "M6 0l1.6 4h4.2l-3.4 2.6l1.3 4.2l-3.7-2.6l-3.7 2.6l1.3-4.2l-3.4-2.6h4.2z",
    "triangle-down": "M.5 1h11l-5.5 10z",
}
SYMBOLS = tuple(SHAPES)
MARKERS = 6

MOST_POINTS = 1000
CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True)
class Look:
    """What tells the lines of one optimizer, or of one run, from the others'."""

    colour: str
    symbol: str


@dataclass(frozen=True, eq=False)
class Series:
    """Errors and losses of one kind.

    Attributes:
        group: whose they are, an optimizer's or a run's label.
        kind: a key of :data:`KINDS`.
        curves: for "error" and "loss", steps, shape (T,), and values, shape (trials, T).
    """

    group: str
    kind: str
    curves: Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Chart:
    """Errors above, losses below.

    Attributes:
        figure: what plotly.js draws; ``meta`` of each trace is its group's place in ``looks``, and
            its kind.
        looks: of each group.
        kinds: of the series in it, in the order of :data:`KINDS`.
        thinned: whether not every record is drawn.
    """

    figure: Mapping[str, Any]
    looks: Mapping[str, Look]
    kinds: Sequence[str]
    thinned: bool


def styles_of_optimizers(names: Sequence[str]) -> dict[str, Look]:
    """Return a look for each optimizer, that of the well-known ones always the same."""
    left = [name for name in names if name not in OWN]
    colours = OWN | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(left)}
    return {
        name: Look(colours[name], SYMBOLS[number % len(SYMBOLS)])
        for number, name in enumerate(names)
    }


def styles_of_runs(labels: Sequence[str]) -> dict[str, Look]:
    """Return a look for each run; colours of many of them run from dark to light in their order."""
    colours = (*OWN.values(), *OTHERS)
    if len(labels) > len(colours):
        # Without the ends of the map: a contrast of 2 on the light and the dark page.
        shades = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.75, len(labels)))
        colours = tuple(to_hex(shade) for shade in shades)
    return {
        label: Look(colours[number], SYMBOLS[number % len(SYMBOLS)])
        for number, label in enumerate(labels)
    }


def curves_of(run: RunFolder, name: str, group: str) -> list[Series]:
    """Return all curves that a run has of an optimizer.

    Args:
        run: the run.
        name: of the optimizer.
        group: label under which they are shown.
    """
    own = History([record for record in run.history.records if record.optimizer == name])
    own.completed = run.history.completed
    found = {side: _recorded(own, name, side) for side in ("test", "train", "uncorrected_train")}
    series = [Series(group, side, found[side]) for side in ("test", "train")]
    if any(not _same(found["train"][m], found["uncorrected_train"][m]) for m, _ in ROWS):
        series.append(Series(group, "uncorrected", found["uncorrected_train"]))
    for kind, known in (("validation", run.results.validation()), ("theory", run.theory)):
        if name in known:
            series.append(Series(group, kind, {m: _single(*known[name][m]) for m, _ in ROWS}))
    return [each for each in series if _has_numbers(each)]


def _recorded(history: History, name: str, side: str) -> dict[str, tuple[Array, Array]]:
    return {metric: history.curves(name, f"{side}_{metric}") for metric, _ in ROWS}


def _single(steps: Array, values: Array) -> tuple[Array, Array]:
    return steps, values[None]


def _same(one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    return np.array_equal(one[1], other[1], equal_nan=True)


def _has_numbers(series: Series) -> bool:
    return any(bool(np.isfinite(values).any()) for _, values in series.curves.values())


def chart(series: Sequence[Series], looks: Mapping[str, Look]) -> Chart:
    """Draw series, medians over trials with quartiles around them.

    Args:
        series: at least one.
        looks: of each group among them.
    """
    groups = list(dict.fromkeys(each.group for each in series))
    traces = []
    for each in series:
        common = {
            "meta": [groups.index(each.group), each.kind],
            "visible": each.kind not in HIDDEN,
        }
        traces += [common | one for one in _traces(each, looks[each.group])]
    return Chart(
        {"data": traces, "layout": _layout(series)},
        {group: looks[group] for group in groups},
        [kind for kind in KINDS if kind in {each.kind for each in series}],
        any(len(steps) > MOST_POINTS for each in series for steps, _ in each.curves.values()),
    )


def _traces(series: Series, look: Look) -> list[dict[str, Any]]:
    traces = []
    for axis, (metric, _) in zip(("y", "y2"), ROWS, strict=True):
        steps, values = series.curves[metric]
        if len(steps) > MOST_POINTS:
            kept = np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)
            steps, values = steps[kept], values[:, kept]
        low, median, high = quartiles(values)
        own = [_line(steps, median, series, look)]
        if len(values) > 1:
            own[0]["customdata"] = list(zip(_numbers(low), _numbers(high), strict=True))
            own[0]["hovertemplate"] += "<br>%{customdata[0]:.4f} to %{customdata[1]:.4f}"
            own.insert(0, _band(steps, low, high, look))
        traces += [{"xaxis": "x", "yaxis": axis} | each for each in own]
    return traces


def _line(steps: Array, median: Array, series: Series, look: Look) -> dict[str, Any]:
    dashes = KINDS[series.kind]
    return {
        "x": _numbers(steps),
        "y": _numbers(median),
        # plotly reads tags and entities in names.
        "name": html.escape(f"{series.group}, {series.kind}", quote=False),
        "mode": "lines" if series.kind == "theory" else "lines+markers",
        "line": {
            "color": look.colour,
            "width": 2,
            "dash": ",".join(f"{part}px" for part in dashes.split(",")) if dashes else "solid",
        },
        "hovertemplate": "%{fullData.name}<br>step %{x}: %{y:.4f}<extra></extra>",
        "marker": {"symbol": look.symbol, "size": 7, "maxdisplayed": MARKERS},
    }


def _band(steps: Array, low: Array, high: Array, look: Look) -> dict[str, Any]:
    """The area between the quartiles, wherever they are numbers."""
    known = np.isfinite(low)
    steps, low, high = steps[known], low[known], high[known]
    red, green, blue = (int(look.colour[at : at + 2], 16) for at in (1, 3, 5))
    return {
        "x": [*_numbers(steps), *_numbers(steps[::-1])],
        "y": [*_numbers(low), *_numbers(high[::-1])],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.18)",
        "hoverinfo": "skip",
    }


def _layout(series: Sequence[Series]) -> dict[str, Any]:
    # What is predicted or hidden at first does not set the scale.
    leading = [each for each in series if each.kind in ("test", "train")] or list(series)
    last = max(float(steps[-1]) for each in series for steps, _ in each.curves.values())
    layout: dict[str, Any] = {
        "autosize": True,
        "margin": {"l": 56, "r": 10, "t": 10, "b": 44},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "showlegend": False,
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "modebar": {"bgcolor": CLEAR},
        "xaxis": {"title": {"text": "Step"}, "anchor": "y2", "zeroline": False},
    }
    if last <= 10:
        layout["xaxis"]["dtick"] = 1
    domains = ((0.54, 1.0), (0.0, 0.46))
    for axis, (metric, label), domain in zip(("yaxis", "yaxis2"), ROWS, domains, strict=True):
        highest = top([each.curves[metric][1] for each in leading])
        layout[axis] = {
            "title": {"text": label},
            "domain": domain,
            # A line at zero is seen in its full width.
            "range": [-0.02 * highest, highest],
            "anchor": "x",
            "zeroline": False,
        }
    return layout


def _numbers(values: Array) -> list[float | None]:
    """Six digits of each value; None, a gap, where it is no number."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
