"""The tracked loss against retraining without a sample, on public tables.

The difference between a training and a test part is mostly the luck of the split. This one is free
of it: some training samples in turn weigh nothing, the same run is made again, and the loss of the
plain network on the sample left out is compared with the loss that the full run tracks for it. Of
each setting: the mean of both, and their difference with its standard error over samples.

    python benchmarks/leave_one_out_tables.py [--tables bupa ...] [--left-out 30] [--json FILE]
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from _tables_data import TABLES, Split, load, split
from _tables_methods import network
from torch import Tensor

import dd

DEFAULT = ("banana", "bupa", "heart", "magic", "pima", "saheart", "vehicle", "wine")
STEPS = 150
# What is corrected beside the noise: nothing, the head and the component means, or what the library
# chooses.
HEADS = {"nothing": False, "head and means": True, "default": "auto"}


def trained(
    part: Split, seed: int, weights: Tensor, head: bool | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that are tracked, those of the plain network, shape (n, C), and its test losses."""
    model = network(part, seed)
    noise = dd.NoiseModel.fit(part.X, part.y, separate_means=True if head is True else None)
    optimizer = dd.DecoupledDescent(model, lr=0.05, momentum=0.9, noise=noise, head=head)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(part.X), part.y, reduction="none")
        (losses @ weights / len(weights)).backward()
        optimizer.step()
    with torch.no_grad():
        tracked = model(part.X)
        model.eval()
        test = F.cross_entropy(model(part.test_X), part.test_y, reduction="none")
        return tracked, model(part.X), test


def compare(part: Split, seed: int, rows: list[int], head: bool | str) -> dict[str, float]:
    """Mean losses of the samples ``rows``: tracked, left out, plain; and the difference."""
    everything = torch.ones(len(part.X))
    tracked, plain, test = trained(part, seed, everything, head)
    without = []
    for row in rows:
        weights = everything.clone()
        weights[row] = 0
        without.append(trained(part, seed, weights, head)[1][row])
    y = part.y[rows]
    left_out = F.cross_entropy(torch.stack(without), y, reduction="none")
    followed = F.cross_entropy(tracked[rows], y, reduction="none")
    difference = followed - left_out
    return {
        "plain": float(F.cross_entropy(plain[rows], y)),
        "tracked": float(followed.mean()),
        "left_out": float(left_out.mean()),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std() / math.sqrt(len(rows))),
        "tracked_of_all": float(F.cross_entropy(tracked, part.y)),
        "test": float(test.mean()),
    }


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=list(DEFAULT), metavar="table")
    parser.add_argument("--left-out", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    print("| table | n | corrected beside | plain | tracked | left out | difference ± s.e. |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.tables:
        part = split(load(name), TABLES[name], arguments.seed)
        order = torch.randperm(len(part.X), generator=torch.Generator().manual_seed(0))
        rows = order[: arguments.left_out].tolist()
        found[name] = {}
        for label, head in HEADS.items():
            print(f"\r{name}, {label}\033[K", end="", file=sys.stderr, flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figures = found[name][label] = compare(part, arguments.seed, rows, head)
            print("\r\033[K", end="", file=sys.stderr)
            print(
                f"| {name} | {len(part.X)} | {label} | {figures['plain']:.3f} | "
                f"{figures['tracked']:.3f} | {figures['left_out']:.3f} | "
                f"{figures['difference']:+.3f} ± {figures['standard_error']:.3f} |",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
