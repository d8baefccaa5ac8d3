"""Every picture."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dd.support.files import replacing
from dd.tracking.any_backend import any_backend
from dd.tracking.history import History, aggregate, summarise

with any_backend():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = ["LABELS", "Curves", "quartiles", "top", "train_vs_test"]

Array = npt.NDArray[np.float64]
# For an optimizer's name and "error" or "loss", steps and values, each of shape (steps,).
Curves = Mapping[str, Mapping[str, tuple[Array, Array]]]

# Of the Okabe-Ito palette: train and test are told apart with any colour vision, and in grey.
TRAIN_COLOUR = "#D55E00"
TRAIN_COLOURS = {"dd_auto": "#009E73"}
TEST_COLOUR = "#0072B2"
GAP_COLOUR = "#BBBBBB"
EXTRA_STYLES = {"theory": ("black", ":"), "validation": ("#CC79A7", "-.")}
LABELS = {
    "gd": "Gradient descent",
    "gd_holdout": "GD, hold-out",
    "gd_kfold": "GD, K folds",
    "sgd": "SGD",
    "sgd_holdout": "SGD, hold-out",
    "sgd_kfold": "SGD, K folds",
    "adamw": "AdamW",
    "adamw_holdout": "AdamW, hold-out",
    "adamw_kfold": "AdamW, K folds",
    "muon": "Muon",
    "schedulefree": "Schedule-Free",
    "lbfgs": "L-BFGS",
    "lbfgs_holdout": "L-BFGS, hold-out",
    "lbfgs_kfold": "L-BFGS, K folds",
    "dd": "Decoupled descent",
    "dd_auto": "DD, lr=auto",
    "dd_tracked": "DD, tracked choice",
    "dd_adamw": "AdamW + DD",
    "dd_muon": "Muon + DD",
    "dd_schedulefree": "Sched.-Free + DD",
    "dd_half": "DD, half damped",
    "dd_pure": "DD, pure",
}
ROWS = (("error", "Error"), ("loss", "Loss"))
DOTS_PER_INCH = 200
MOST_COLUMNS = 5


def train_vs_test(
    history: History,
    path: str | os.PathLike[str],
    title: str,
    theory: Curves | None = None,
    validation: Curves | None = None,
) -> None:
    """Draw train and test curves of every optimizer and write them to a PNG file.

    One column an optimizer, at most five beside one another; errors above, losses below, on common
    axes; the gap between train and test is shaded, its mean printed. Several trials are drawn as
    medians with 25 to 75 % bands. A curve ends where it is no longer a number. An optimizer that
    ended before a third of the longest run has steps of its own scale.

    Args:
        history: what was recorded.
        path: file to write, whole or not at all.
        title: heading of the figure.
        theory: predicted curves.
        validation: what optimizers that choose among candidates judged the chosen one by.

    Raises:
        ValueError: if the history is empty.
    """
    optimizers = history.optimizers
    if not optimizers:
        raise ValueError("there is nothing to draw: the history holds no records")
    columns = min(len(optimizers), MOST_COLUMNS)
    bands = math.ceil(len(optimizers) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 5.4 * bands), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * bands, columns, sharey="row", squeeze=False)
    for number, optimizer in enumerate(optimizers):
        band, column = divmod(number, columns)
        pair = list(axes[2 * band : 2 * band + 2, column])
        _column(pair, history, optimizer, {"theory": theory or {}, "validation": validation or {}})
    for empty in axes[-2:, len(optimizers) - columns * (bands - 1) :].flat:
        empty.remove()
    for row, (metric, label) in zip(axes, ROWS * bands, strict=True):
        row[0].set_ylabel(label)
        row[0].set_ylim(0, top(_shown(history, metric)))
    figure.suptitle(_heading(history, title))
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DOTS_PER_INCH)


def _column(
    pair: Sequence[Axes], history: History, optimizer: str, extra: Mapping[str, Curves]
) -> None:
    """Draw an optimizer's errors and losses, and the extra curves that it has."""
    for axes, (metric, _) in zip(pair, ROWS, strict=True):
        _panel(axes, history, optimizer, metric)
        for label, curves in extra.items():
            if optimizer in curves:
                colour, style = EXTRA_STYLES[label]
                axes.plot(
                    *curves[optimizer][metric],
                    color=colour,
                    linestyle=style,
                    linewidth=1.6,
                    label=label,
                )
        _scale_steps(axes, history, optimizer)
    pair[0].set_xlabel("")
    pair[0].tick_params(labelbottom=False)
    pair[0].set_title(LABELS.get(optimizer, optimizer), loc="left", weight="bold")
    if _needs_legend(history, optimizer, extra):
        pair[0].legend(loc="upper right", frameon=False)


def _needs_legend(history: History, optimizer: str, extra: Mapping[str, Curves]) -> bool:
    """Whether a column is the first to show something."""
    first = [history.optimizers[0], *(next(iter(curves)) for curves in extra.values() if curves)]
    return optimizer in first or optimizer in TRAIN_COLOURS


def _panel(axes: Axes, history: History, optimizer: str, metric: str) -> None:
    steps, train = history.curves(optimizer, f"train_{metric}")
    _, test = history.curves(optimizer, f"test_{metric}")
    tested = not np.isnan(test).all()
    test_median = _curve(axes, steps, test, "test", TEST_COLOUR, "-") if tested else test[0]
    colour = TRAIN_COLOURS.get(optimizer, TRAIN_COLOUR)
    train_median = _curve(axes, steps, train, "train", colour, (0, (4, 2)))
    axes.fill_between(steps, train_median, test_median, color=GAP_COLOUR, alpha=0.4, linewidth=0)
    axes.set_title(_gap(history, optimizer, metric), loc="right", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _shown(history: History, metric: str) -> list[Array]:
    columns = (f"train_{metric}", f"test_{metric}")
    return [history.curves(name, column)[1] for name in history.optimizers for column in columns]


def _curve(
    axes: Axes,
    steps: Array,
    values: Array,
    label: str,
    colour: str,
    style: str | tuple[int, tuple[int, int]],
) -> Array:
    """Draw values (trials, steps) as a median in its band; return the median, shape (steps,)."""
    low, median, high = quartiles(values)
    if len(values) > 1:
        axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0)
    # A curve of one point has no line to be seen.
    marker = "o" if np.isfinite(median).sum() == 1 else None
    axes.plot(
        steps, median, color=colour, linestyle=style, linewidth=1.6, label=label, marker=marker
    )
    return median


def quartiles(values: Array) -> Array:
    """Return the quartiles over trials, shape (3, steps), NaN where no trial has a number.

    Args:
        values: shape (trials, steps).
    """
    values = np.where(np.isfinite(values), values, np.nan)
    known = ~np.isnan(values).all(0)
    found = np.full((3, values.shape[1]), np.nan)
    found[:, known] = np.nanquantile(values[:, known], [0.25, 0.5, 0.75], axis=0)
    return found


def top(curves: Sequence[Array]) -> float:
    """Return an upper limit of an axis, such that a late explosion does not flatten the rest.

    Args:
        curves: that share the axis, each of shape (trials, steps).
    """
    values = np.concatenate([curve.ravel() for curve in curves])
    start = np.concatenate([curve[:, 0] for curve in curves])
    values, start = values[np.isfinite(values)], start[np.isfinite(start)]
    if not values.any():
        return 1.0
    usual = start.max(initial=0) or np.median(values)
    return 1.05 * float(min(values.max(), 4 * usual) or values.max())


def _scale_steps(axes: Axes, history: History, optimizer: str) -> None:
    first = min(record.step for record in history.records)
    longest = max(record.step for record in history.records)
    own = max(record.step for record in history.records if record.optimizer == optimizer)
    short = 0 < 3 * own < longest
    axes.set_xlim(first - 0.5, (own if short else longest) + 0.5)
    axes.set_xlabel("Step (own scale)" if short else "Step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _gap(history: History, optimizer: str, metric: str) -> str:
    trials = [summarise(history.select(optimizer, t)) for t in history.trials(optimizer)]
    gap = aggregate(trials)[f"mean_{metric}_gap"]
    if np.isnan(history.curves(optimizer, "test_error")[1]).all():
        return "no test set"
    if not np.isfinite(gap):
        return "mean |train − test| undefined"
    return f"mean |train − test| {gap:.3f}" if gap < 1000 else f"mean |train − test| {gap:.1e}"


def _heading(history: History, title: str) -> str:
    trials = max(len(history.trials(name)) for name in history.optimizers)
    return title if trials == 1 else f"{title}\nmedian and 25–75 % of {trials} trials"
