"""Draw the drift of the identity: train − test of decoupled descent against steps, for several n.

Signed means over trials at fixed α = n/d, in bands of two standard errors. Smaller sizes get more
trials, so that all have as many samples in all. The start is informed.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from _drawing import Rows, canvas, count, explained, options, positive, save, show
from _xor import Xor, repetitions
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

METRICS = ("error", "loss")


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a size and recorded step: mean gaps and their standard errors."""
    for n in args.samples:
        problem = Xor(
            dimension=max(2, round(n / args.alpha)),
            alpha=args.alpha,
            num_test=2 * n,
            lr=args.lr,
            steps=args.steps,
            record_every=max(1, args.steps // 40),
        )
        trials = repetitions(args.trials, max(args.samples), n)
        found = problem.trials(["dd"], range(args.seed, args.seed + trials))
        for record, step in enumerate(found.steps.tolist()):
            row = {"n": problem.num_train, "d": problem.dimension, "trials": trials, "step": step}
            for metric in METRICS:
                curves = found.metrics["dd"]
                gap = (curves[f"train_{metric}"] - curves[f"test_{metric}"])[:, record]
                row[f"{metric}_gap"] = float(gap.mean())
                row[f"{metric}_standard_error"] = float(gap.std() / math.sqrt(trials))
            yield row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, "gap_against_steps", steps=400, trials=120)
    parser.add_argument(
        "--samples",
        type=count,
        nargs="+",
        default=[200, 400, 800, 1600],
        help="training samples n; --trials is of the largest",
    )
    parser.add_argument("--alpha", type=positive, default=4.0, help="n/d")
    args = parser.parse_args(arguments)
    args.samples = sorted(set(args.samples))
    if args.trials < 2:
        parser.error("--trials must be 2 or more: standard errors are over trials")
    with explained(parser):
        rows = list(measured(args))
    with canvas(7, 3) as figure:
        panels = figure.subplots(1, 2)
        for axes, metric in zip(panels, METRICS, strict=True):
            _panel(axes, rows, metric)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(
            f"Drift of the identity train = test: decoupled descent on XOR, α = n/d = "
            f"{args.alpha:g}\nmean over trials ± 2 standard errors"
        )
        save(figure, args.out, rows)
    show([row for row in rows if row["step"] in (args.steps // 2, args.steps)], args.out)


def _panel(axes, rows: Rows, metric: str) -> None:
    sizes = sorted({row["n"] for row in rows})
    # From light to dark, and the lightest yellow left out.
    colours = colormaps["viridis_r"](np.linspace(0.15, 1, len(sizes)))
    for n, colour in zip(sizes, colours, strict=True):
        own = [row for row in rows if row["n"] == n]
        steps = [row["step"] for row in own]
        mean = [row[f"{metric}_gap"] for row in own]
        margin = [2 * row[f"{metric}_standard_error"] for row in own]
        low, high = ([m + sign * e for m, e in zip(mean, margin, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=colour, label=f"n = {n}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"train − test {metric}")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


if __name__ == "__main__":
    main()
