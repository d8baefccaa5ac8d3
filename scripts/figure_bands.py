"""Draw train and test curves of gradient descent and of decoupled descent, all, half and no drift.

Medians with 25 to 75 % bands over trials, under the curves of state evolution. With the folder of a
run of ``python -m dd experiment=xor_paper`` its curves are drawn again, and nothing is trained.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _drawing import Rows, count, explained, options, show, write_rows
from _xor import DAMPING, Xor

import dd
from dd.tracking.figures import train_vs_test
from dd.tracking.history import METRICS, Array, History, Record

Theory = Mapping[str, Mapping[str, tuple[Array, Array]]]


def read(folder: Path) -> tuple[History, Theory]:
    """Return what a run folder holds: the records, and curves of theory where there are any."""
    history = History()
    for row in _rows(folder / "history.csv"):
        values = (float(row[name]) for name in METRICS)
        history.append(Record(row["optimizer"], int(row["trial"]), int(row["step"]), *values))
    predicted = folder / "state_evolution.csv"
    found = _rows(predicted) if predicted.exists() else []
    theory = {}
    for name in dict.fromkeys(row["optimizer"] for row in found):
        own = [row for row in found if row["optimizer"] == name]
        steps, error, loss = (
            np.array([float(row[key]) for row in own]) for key in ("step", "error", "loss")
        )
        theory[name] = {"error": (steps, error), "loss": (steps, loss)}
    return history, theory


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def trained(args: argparse.Namespace) -> tuple[History, Theory]:
    """Train, and simulate state evolution."""
    problem = Xor(args.dimension, lr=args.lr, steps=args.steps)
    seeds = range(args.seed, args.seed + args.trials)
    history = recorded(problem.trials(["gd", *DAMPING], seeds))
    theory = {}
    for name, damping in DAMPING.items():
        found = problem.theory(seeds[: args.simulations], damping=damping)
        steps = found.steps.double().numpy()
        theory[name] = {
            "error": (steps, found.error.mean.numpy()),
            "loss": (steps, found.loss.mean.numpy()),
        }
    return history, theory


def recorded(trials: dd.Trials) -> History:
    """The records of many trials."""
    history = History()
    for name, curves in trials.metrics.items():
        for trial in range(len(trials.seeds)):
            for index, step in enumerate(trials.steps.tolist()):
                values = (float(curves[metric][trial, index]) for metric in METRICS)
                history.append(Record(name, trial, step, *values))
    return history


def table(history: History, theory: Theory) -> Rows:
    """The curves that are drawn, one row an optimizer and step."""
    rows = []
    for name in history.optimizers:
        columns: dict[str, Any] = {}
        for metric in ("train_error", "test_error", "train_loss", "test_loss"):
            steps, values = history.curves(name, metric)
            for label, share in (("25", 0.25), ("median", 0.5), ("75", 0.75)):
                columns[f"{metric}_{label}"] = np.quantile(values, share, axis=0).tolist()
        for metric in ("error", "loss"):
            known = dict(zip(*theory[name][metric], strict=True)) if name in theory else {}
            columns[f"theory_{metric}"] = [float(known.get(step, np.nan)) for step in steps]
        for step, *values in zip(steps, *columns.values(), strict=True):
            rows.append(
                {"optimizer": name, "step": int(step), **dict(zip(columns, values, strict=True))}
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Read or measure, print, draw."""
    parser = options(__doc__, "bands", steps=200, trials=50)
    parser.add_argument("folder", type=Path, nargs="?", help="run folder to draw again")
    parser.add_argument("--dimension", type=count, default=500, help="d; n is 4 d")
    parser.add_argument("--simulations", type=count, default=8, help="of state evolution")
    args = parser.parse_args(arguments)
    if args.out.suffix != ".png":
        parser.error(f"--out: this picture is written as .png, got {args.out}")
    if args.folder is not None and not (args.folder / "history.csv").exists():
        parser.error(f"{args.folder} holds no history.csv; give the folder of a run")
    with explained(parser):
        history, theory = trained(args) if args.folder is None else read(args.folder)
        rows = table(history, theory)
    write_rows(args.out, rows)
    train_vs_test(history, args.out, "XOR: decoupled descent follows state evolution", theory)
    shown = ("train_error_median", "test_error_median", "theory_error")
    last = {row["optimizer"]: row for row in rows}.values()
    show([{k: row[k] for k in ("optimizer", "step", *shown)} for row in last], args.out)


if __name__ == "__main__":
    main()
