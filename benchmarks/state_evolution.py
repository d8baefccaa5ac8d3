"""State evolution beside decoupled descent of growing size, and the time that it takes.

    python benchmarks/state_evolution.py --check

XOR from one informed start at fixed n/d. For every size d the means over trials of the training
and test losses and errors are held against the prediction at every recorded step. Stated errors are
those of both means, and no more: what finite size adds should be below them. A maximum over some
forty steps that move together is compared with the value that their number would exceed once in
a hundred runs if they were independent.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from scipy import stats

import dd
from dd.data import generator, xor
from dd.experiments.models import informed_two_layer
from dd.support.files import write_json

ALPHA = 4
START = {"overlap": 0.5, "hidden_scale": 0.5}
METRICS = ("train_loss", "test_loss", "train_error", "test_error")
SECONDS = 30


def _split(dimension, seed):
    return xor(dimension=dimension, num_train=ALPHA * dimension, num_test=10_000, seed=seed)


def _model(seed, split):
    source = generator(seed, "initialisation")
    return informed_two_layer(
        split.dimension, 8, 2, mixture=split.mixture, **START, generator=source
    )


def _predicted(dimension, given, damping, paths):
    split = xor(dimension=dimension, num_train=1, num_test=1)
    return dd.state_evolution(
        lambda source: _model(source.initial_seed() % 2**31, split),
        split.mixture,
        alpha=ALPHA,
        steps=given.steps,
        lr=given.lr,
        damping=damping,
        paths=paths,
        record_every=5,
        progress=True,
    )


def _compare(dimension, trials, damping, given):
    """Largest distance from the prediction, the errors there, and the largest in units of them."""
    predicted = _predicted(dimension, given, damping, given.paths)
    make = partial(dd.DecoupledDescent, lr=given.lr, damping=damping)
    found = dd.run_trials(
        lambda seed: _split(dimension, seed),
        _model,
        {"dd": make},
        seeds=range(trials),
        steps=given.steps,
        record_every=5,
        noise=lambda split: dd.NoiseModel.isotropic(split.train_inputs, split.train_components),
        progress=True,
    )
    rows = {}
    for metric in METRICS:
        curve = predicted.loss if metric.endswith("loss") else predicted.error
        values = found.metrics["dd"][metric]
        off = (values.mean(0) - curve.mean).abs()
        error = (values.var(0) / trials + curve.standard_error.square()).sqrt()
        most = int(off.argmax())
        rows[metric] = {
            "largest": float(off[most]),
            "error_there": float(error[most]),
            "largest_in_errors": float((off / error).max()),
            "median_distance": float((values.median(0).values - curve.mean).abs().max()),
        }
    return rows


def _threshold(trials, records):
    """What the largest of so many independent t variables exceeds once in a hundred times."""
    # The fewer degrees of freedom of the two standard errors.
    return float(stats.t.isf(0.01 / (2 * records), min(trials, 8) - 1))


def _timed(given):
    started = time.perf_counter()
    _predicted(1000, argparse.Namespace(steps=200, lr=given.lr), 1.0, 20_000)
    return time.perf_counter() - started


def main():
    """Print the table, write it, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--trials", type=int, nargs="+", default=[40, 20, 10, 6])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1.0, 0.5, 0.0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--paths", type=int, default=80_000)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--check", action="store_true", help="fail where a threshold is passed")
    given = parser.parse_args()
    if len(given.sizes) != len(given.trials):
        parser.error("--trials takes a number for each of --sizes")
    seconds, rows, holds = _timed(given), [], True
    print(f"200 steps, k = 8, 20,000 paths: {seconds:.1f} s on {torch.get_num_threads()} threads")
    print("| rho | d | trials | metric | largest distance | ± | in errors | threshold |")
    print("|---|---|---|---|---|---|---|---|")
    for damping in given.dampings:
        for dimension, trials in zip(given.sizes, given.trials, strict=True):
            limit = _threshold(trials, given.steps // 5 + 1)
            for metric, row in _compare(dimension, trials, damping, given).items():
                rows.append(
                    {"damping": damping, "dimension": dimension, "trials": trials, "metric": metric}
                    | row
                )
                holds &= row["largest_in_errors"] < limit
                print(
                    f"| {damping:g} | {dimension} | {trials} | {metric} | {row['largest']:.4f} "
                    f"| {row['error_there']:.4f} | {row['largest_in_errors']:.2f} | {limit:.1f} |",
                    flush=True,
                )
    if given.json is not None:
        write_json(given.json, {"seconds": seconds, "rows": rows})
    return int(given.check and not (holds and seconds <= SECONDS))


if __name__ == "__main__":
    raise SystemExit(main())
