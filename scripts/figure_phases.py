"""Draw test errors over a grid of α = n/d and ‖μ‖: gradient descent, decoupled descent, theory.

Every cell is the mean over trials of the test error at the step of lowest training error, of
lowest training loss among equals, both corrected under decoupled descent (--at selected); or after
the last step (--at final). The numbers beside the picture are of both. Theory is state evolution
from the trials' own starts, at the step of decoupled descent, as the minimum of its own simulated
curves would be too low. The last panel is decoupled descent less theory. The start is informed.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _drawing import Rows, canvas, count, explained, options, positive, save, show
from _xor import Xor
from torch import Tensor

from dd.support.progress import progress_bar

STEPS = {"selected": "at the lowest training error", "final": "after the last step"}
PANELS = {"gd": "Gradient descent", "dd": "Decoupled descent", "theory": "State evolution of DD"}


def chosen(curves: Mapping[str, Tensor], at: str) -> Tensor:
    """Which record of every trial is looked at, shape (trials, 1)."""
    error, loss = curves["train_error"], curves["train_loss"]
    if at == "final":
        return torch.full((len(error), 1), error.shape[1] - 1)
    # As dd.tracking.history.selected_step: of lowest training loss among equal errors.
    lowest = error == error.min(1, keepdim=True).values
    return loss.where(lowest, math.inf).argmin(1, keepdim=True)


def cell(args: argparse.Namespace, alpha: float, separation: float) -> dict[str, Any]:
    """Errors at one point of the grid, each with its standard error."""
    problem = Xor(
        args.dimension, alpha, separation, args.num_test, args.lr, args.steps, record_every=5
    )
    seeds = range(args.seed, args.seed + args.trials)
    found = problem.trials(["gd", "dd"], seeds, progress=False).metrics
    limit = problem.theory(seeds, paths=args.paths, progress=False).error.values
    row: dict[str, Any] = {"alpha": alpha, "separation": separation, "n": problem.num_train}
    for at in STEPS:
        record = {name: chosen(curves, at) for name, curves in found.items()}
        errors = {name: found[name]["test_error"].gather(1, record[name])[:, 0] for name in found}
        errors["theory"] = limit.gather(1, record["dd"])[:, 0]
        errors["difference"] = errors["dd"] - errors["theory"]
        for name, values in errors.items():
            row[f"{name}_{at}"] = float(values.mean())
            row[f"{name}_{at}_standard_error"] = float(values.std() / math.sqrt(len(values)))
    return row


def measured(args: argparse.Namespace) -> Rows:
    """One row a cell."""
    total = len(args.alphas) * len(args.separations)
    rows = []
    with progress_bar("cells", total, show=True) as advance:
        for alpha in args.alphas:
            for separation in args.separations:
                rows.append(cell(args, alpha, separation))
                advance(1)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, "phases", steps=200, trials=4)
    parser.add_argument(
        "--alphas", type=positive, nargs="+", default=[1, 1.5, 2, 3, 4, 6], help="n/d"
    )
    parser.add_argument(
        "--separations", type=positive, nargs="+", default=[1.5, 2, 2.5, 3, 3.5, 4], help="‖μ‖"
    )
    parser.add_argument("--dimension", type=count, default=250, help="d")
    parser.add_argument("--num-test", type=count, default=4000, help="test samples")
    parser.add_argument("--paths", type=count, default=2500, help="of theory, for each trial")
    parser.add_argument(
        "--at", choices=list(STEPS), default="selected", help="which step's test error is drawn"
    )
    args = parser.parse_args(arguments)
    if args.trials < 2:
        parser.error("--trials must be 2 or more: standard errors are over trials")
    args.alphas, args.separations = sorted(set(args.alphas)), sorted(set(args.separations))
    with explained(parser):
        rows = measured(args)
    with canvas(6.4, 5.6) as figure:
        _draw(figure, rows, args)
        figure.suptitle(
            f"Test error on XOR {STEPS[args.at]} of {args.steps} steps\n"
            f"d = {args.dimension}, mean of {args.trials} trials, informed start"
        )
        save(figure, args.out, rows)
    hidden = ["_standard_error", *(f"_{at}" for at in STEPS if at != args.at)]
    shown = [key for key in rows[0] if not any(end in key for end in hidden)]
    show([{key: row[key] for key in shown} for row in rows], args.out)


def _draw(figure, rows: Rows, args: argparse.Namespace) -> None:
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    top = max(row[f"{name}_{args.at}"] for row in rows for name in PANELS)
    for axes, (name, title) in zip(panels.flat, PANELS.items(), strict=False):
        shades = _heat_map(axes, args, rows, name, cmap="cividis", vmin=0, vmax=top)
        axes.set_title(title, loc="left")
    figure.colorbar(shades, ax=panels[0], label="test error (also of state evolution)")
    largest = max(abs(row[f"difference_{args.at}"]) for row in rows)
    scale = {"cmap": "PuOr", "vmin": -largest, "vmax": largest}
    shades = _heat_map(panels[1, 1], args, rows, "difference", **scale)
    panels[1, 1].set_title("Decoupled descent − state evolution", loc="left")
    figure.colorbar(shades, ax=panels[1], label="difference of test errors")
    for axes in panels[1]:
        axes.set_xlabel("α = n/d")
    for axes in panels[:, 0]:
        axes.set_ylabel("‖μ‖")


def _heat_map(axes, args: argparse.Namespace, rows: Rows, name: str, **scale: Any):
    values = np.array([row[f"{name}_{args.at}"] for row in rows]).reshape(len(args.alphas), -1).T
    shades = axes.imshow(values, origin="lower", aspect="auto", **scale)
    for (y, x), value in np.ndenumerate(values):
        red, green, blue, _ = shades.to_rgba(value)
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        text = f"{value:.2f}" if name != "difference" else f"{value:+.3f}".replace("-", "−")
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(args.alphas)), [f"{alpha:g}" for alpha in args.alphas])
    axes.set_yticks(range(len(args.separations)), [f"{norm:g}" for norm in args.separations])
    axes.grid(visible=False)
    return shades


if __name__ == "__main__":
    main()
