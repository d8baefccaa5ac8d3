"""Decoupled descent beside the baselines a careful user would take, on five subsets of real data.

    python benchmarks/baselines.py                     # noisy MNIST and CIFAR-10 features
    python benchmarks/baselines.py cifar10_probe --trials 2 --out results

Finds its data through DD_DATA. Every optimizer of ``OPTIMIZERS`` is trained as by ``python -m dd``,
one after the other in one process, so that their seconds compare; run folders go to ``--out``. The
exit code is 1 where a target is missed:

* what decoupled descent reports is within 0.015 of its test error, in the mean of the distances;
* the training error of every plain baseline is off by more than 0.15;
* ``dd`` or ``dd_auto`` has a lower test error than every hold-out baseline, in the mean;
* and takes less than a third of the time of 5-fold cross-validation, and so does what has the lower
  test error.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console

from dd.experiments.experiment import Experiment
from dd.tracking.console import methods

CONFIGS = Path(__file__).parents[1] / "configs"
SAMPLES = {"cifar10_probe": 1000, "noisy_mnist": 2000}

OURS = ("dd", "dd_auto")
PLAIN = ("gd", "sgd", "adamw", "lbfgs")
HOLDOUT = tuple(f"{name}_holdout" for name in PLAIN)
FOLDS = tuple(f"{name}_kfold" for name in PLAIN)
OPTIMIZERS = (*PLAIN, *HOLDOUT, *FOLDS, *OURS, "dd_tracked")

WITHIN, OFF, SHARE = 0.015, 0.15, 1 / 3

Figures = Mapping[str, Mapping[str, Any]]


def run(name: str, folder: Path, options: argparse.Namespace) -> Figures:
    """Train all optimizers and return the figures of ``summary.json``."""
    overrides = [
        f"experiment={name}",
        f"data.num_train={SAMPLES[name]}",
        f"optimizers=[{','.join(OPTIMIZERS)}]",
        f"trials={options.trials}",
        f"seed={options.seed}",
        f"device={options.device}",
        "together=false",
        "tracking.wandb.mode=disabled",
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides=overrides)
    experiment = Experiment(config, folder)
    experiment.run()
    for sentence in [*experiment.notes, *experiment.failures]:
        print(f"note: {sentence}")
    return experiment.summary


def missed(found: Figures) -> list[str]:
    """Return a sentence on each target that is missed."""
    sentences = []
    for name in OURS:
        if (gap := found[name]["reported_gap"]) > WITHIN:
            sentences.append(f"{name} reports an error {gap:.4f} off")
    for name in PLAIN:
        if (gap := found[name]["reported_gap"]) <= OFF:
            sentences.append(f"{name}'s training error is off by {gap:.4f} only")
    best = min(OURS, key=lambda name: found[name]["reported_test_error"])
    for name in HOLDOUT:
        if found[name]["reported_test_error"] <= found[best]["reported_test_error"]:
            sentences.append(f"{name} reaches a test error no higher than that of {best}")
    for fold in FOLDS:
        share = found[best]["fit_seconds"] / found[fold]["fit_seconds"]
        if share >= SHARE:
            sentences.append(f"{best} takes {share:.2f} of the time of {fold}")
    return sentences


def main() -> None:
    """Print a table for each experiment; exit 1 where a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", help=", ".join(SAMPLES))
    parser.add_argument("--trials", type=int, default=5, help="number of subsets")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the run folders")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    unknown = set(options.experiments) - set(SAMPLES)
    if unknown:
        parser.error(f"experiments are {', '.join(SAMPLES)}; got {', '.join(sorted(unknown))}")
    out = options.out or Path(tempfile.mkdtemp(prefix="baselines_"))
    found, failed = {}, False
    for name in options.experiments or SAMPLES:
        found[name] = run(name, out / name, options)
        print(f"{name}, n = {SAMPLES[name]}, means over {options.trials} subsets")
        Console().print(methods(found[name]))
        for sentence in missed(found[name]):
            failed = True
            print(f"missed: {sentence}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
