"""Many trials as one computation against one at a time, as a ratio.

XOR (d = 500, n = 2000, separation 2.5), k = 8, GELU, rate 0.5, 200 steps from the same weights on
the same data, without records between the first and the last state. *looped* is the ordinary loop:
model, optimizer, cross-entropy, step(). Both fit their noise models; neither makes its data. The
two take turns, so that whatever else the machine does falls on both.

    python benchmarks/trials.py [--trials 100] [--rounds 3] [--device cuda] [--check] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
from dd.data import Split, generator, xor
from dd.experiments.models import two_layer

WIDTH, RATE = 8, 0.5
LEAST = {"cpu": 1.5, "cuda": 20.0}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "gd": partial(torch.optim.SGD, lr=RATE),
    "dd": partial(dd.DecoupledDescent, lr=RATE),
}
LINEUPS = (("gd",), ("dd",), ("gd", "dd"))

Weights = dict[str, list[Tensor]]


def make_model(seed: int, split: Split) -> nn.Sequential:
    """The network of a trial."""
    return two_layer(split.dimension, WIDTH, 2, generator=generator(seed, "initialisation"))


def looped(names: tuple[str, ...], splits: list[Split], device: str, steps: int) -> Weights:
    """Train one trial and one optimizer after the other; the last decoupled weights."""
    found: Weights = {name: [] for name in names}
    for seed, split in enumerate(splits):
        here = split.to(device)
        for name in names:
            model = make_model(seed, split).to(device)
            optimizer = OPTIMIZERS[name](model if name == "dd" else model.parameters())
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(here.train_inputs), here.train_targets).backward()
                optimizer.step()
            found[name].append(model[0].weight.detach().cpu())
    return found


def batched(names: tuple[str, ...], splits: list[Split], device: str, steps: int) -> Weights:
    """The same by :func:`dd.run_trials`."""
    trials = dd.run_trials(
        splits.__getitem__,
        make_model,
        {name: OPTIMIZERS[name] for name in names},
        seeds=range(len(splits)),
        steps=steps,
        record_every=steps,
        device=device,
    )
    return {name: list(trials.weights[name]["0.weight"]) for name in names}


def measure(names: tuple[str, ...], splits: list[Split], options: Any) -> dict[str, Any]:
    """Seconds of both ways, their ratio in each round, and how far their weights are apart."""
    seconds: dict[str, list[float]] = {"looped": [], "batched": []}
    weights: dict[str, Weights] = {}
    for number in range(options.rounds):
        for way in (looped, batched):
            _tell(f"{' + '.join(names)}: round {number + 1} of {options.rounds}, {way.__name__}")
            started = time.perf_counter()
            weights[way.__name__] = way(names, splits, options.device, options.steps)
            seconds[way.__name__].append(time.perf_counter() - started)
    apart = max(
        float((a - b).norm() / a.norm())
        for name in names
        for a, b in zip(weights["looped"][name], weights["batched"][name], strict=True)
    )
    ratios = [a / b for a, b in zip(seconds["looped"], seconds["batched"], strict=True)]
    return {"optimizers": names, **seconds, "ratios": ratios, "weights_apart": apart}


def _tell(text: str) -> None:
    print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Print the table; with --check exit 1 where the ratio of decoupled descent is too small."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = {"dimension": 500, "num_train": 2000, "num_test": 100, "separation": 2.5}
    splits = [xor(seed=seed, **sizes) for seed in range(options.trials)]
    for way in (looped, batched):
        way(LINEUPS[-1], splits[:1], options.device, 3)
    print("| optimizers | looped, s | batched, s | ratio | of rounds | weights apart |")
    print("|---|---|---|---|---|---|", flush=True)
    found = []
    for names in LINEUPS:
        row = measure(names, splits, options)
        ratio = statistics.median(row["ratios"])
        medians = [statistics.median(row[way]) for way in ("looped", "batched")]
        _tell("")
        print(
            f"| {' + '.join(names)} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio:.2f} | "
            f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f} | {row['weights_apart']:.1e} |",
            flush=True,
        )
        found.append({**row, "ratio": ratio})
    if options.json is not None:
        about = {"threads": torch.get_num_threads(), **vars(options), "json": str(options.json)}
        options.json.write_text(json.dumps({"settings": about, "rows": found}, indent=1) + "\n")
    least = LEAST[torch.device(options.device).type]
    slow = [row for row in found if "dd" in row["optimizers"] and row["ratio"] < least]
    if options.check and slow:
        sys.exit(f"below the ratio of {least}: {[' + '.join(row['optimizers']) for row in slow]}")


if __name__ == "__main__":
    main()
