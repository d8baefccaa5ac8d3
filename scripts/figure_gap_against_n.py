"""Draw |train − test| of gradient descent and of decoupled descent against n at fixed α = n/d.

Means over trials and recorded steps, with standard errors, beside the floor: what the errors or
losses of two independent samples of n and n_test = 2 n would differ by on average, √(2/π) times
√(v (1/n + 1/n_test)), v the variance of one sample's error or loss, from state evolution. A gap at
the floor is that of a training set which is as good as fresh. Smaller sizes get more trials, so
that all have as many samples in all. The start is informed.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from _drawing import COLOURS, Rows, canvas, count, explained, options, positive, save, show
from _xor import Xor, repetitions
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
from torch import Tensor

from dd.tracking.figures import LABELS

METRICS = ("error", "loss")


def floor(variance: Tensor, num_train: int, num_test: int) -> float:
    """Mean |difference| of two independent means over samples, averaged over steps.

    Args:
        variance: of one sample at every step, shape (T,).
        num_train: size of the one.
        num_test: size of the other.
    """
    deviation = (variance * (1 / num_train + 1 / num_test)).sqrt()
    return math.sqrt(2 / math.pi) * float(deviation.mean())


def variances(problem: Xor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Variance of a sample's error and loss at every step of decoupled descent, in the limit."""
    first = problem.theory(seeds)
    p, mean = first.error.mean, first.loss.mean
    square = problem.theory(seeds, error=_squared_loss).error.mean
    return {"error": p * (1 - p), "loss": square - mean.square()}


def _squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").square()


def measured(args: argparse.Namespace) -> Rows:
    """One row a metric, optimizer and size: the gap, its standard error, and the floor."""
    problems = [_problem(args, n) for n in args.samples]
    spread = variances(problems[-1], range(args.seed, args.seed + args.simulations))
    rows = []
    for problem in problems:
        trials = repetitions(args.trials, problems[-1].num_train, problem.num_train)
        seeds = range(args.seed, args.seed + trials)
        found = problem.trials(["gd", "dd"], seeds).metrics
        for metric in METRICS:
            lowest = floor(spread[metric], problem.num_train, problem.num_test)
            for name, curves in found.items():
                gap = (curves[f"train_{metric}"] - curves[f"test_{metric}"]).abs().mean(1)
                rows.append(
                    {
                        "metric": metric,
                        "optimizer": name,
                        "n": problem.num_train,
                        "d": problem.dimension,
                        "trials": trials,
                        "gap": float(gap.mean()),
                        "standard_error": float(gap.std() / math.sqrt(len(gap))),
                        "floor": lowest,
                    }
                )
    return sorted(rows, key=lambda row: (row["metric"], row["optimizer"], row["n"]))


def _problem(args: argparse.Namespace, n: int) -> Xor:
    return Xor(
        dimension=max(2, round(n / args.alpha)),
        alpha=args.alpha,
        num_test=2 * n,
        lr=args.lr,
        steps=args.steps,
    )


def slope(rows: Rows) -> float:
    """Slope of log gap against log n."""
    gaps = [(row["n"], row["gap"]) for row in rows]
    return float(np.polyfit(*np.log(gaps).T, 1)[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, "gap_against_n", steps=200, trials=10)
    parser.add_argument(
        "--samples",
        type=count,
        nargs="+",
        default=[200, 400, 800, 1600, 3200, 6400],
        help="training samples n, two sizes or more; --trials is of the largest",
    )
    parser.add_argument("--alpha", type=positive, default=4.0, help="n/d")
    parser.add_argument("--simulations", type=count, default=8, help="of state evolution")
    args = parser.parse_args(arguments)
    args.samples = sorted(set(args.samples))
    if len(args.samples) < 2:
        parser.error("--samples needs two different sizes or more")
    if args.trials < 2:
        parser.error("--trials must be 2 or more: standard errors are over trials")
    with explained(parser):
        rows = measured(args)
    with canvas(7, 3) as figure:
        for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
            _panel(axes, [row for row in rows if row["metric"] == metric], metric)
        figure.suptitle(
            f"Gap between train and test on XOR at α = n/d = {args.alpha:g}\n"
            f"mean over steps 0 to {args.steps} and over trials ± standard error"
        )
        save(figure, args.out, rows)
    show(rows, args.out)


def _panel(axes, rows: Rows, metric: str) -> None:
    for name, marker in (("gd", "s"), ("dd", "o")):
        own = [row for row in rows if row["optimizer"] == name]
        n, gap, error = ([row[key] for row in own] for key in ("n", "gap", "standard_error"))
        label = f"{LABELS[name]}, slope {slope(own):.2f}".replace("-", "−")
        axes.errorbar(
            n, gap, error, color=COLOURS[name], marker=marker, markersize=4, capsize=2, label=label
        )
    # Test sets grow with n, so that the floor is a line of slope −1/2.
    lowest = [row["floor"] for row in own]
    axes.plot(n, lowest, "k:", label="two independent samples, ∝ $n^{-1/2}$")
    axes.set(xscale="log", yscale="log", xlabel="training samples n", xticks=n)
    axes.set_ylabel(f"mean |train − test| {metric}")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.6 * min(lowest), 8 * max(row["gap"] for row in rows))
    axes.legend(loc="upper right")


if __name__ == "__main__":
    main()
