"""Any optimizer followed by ``dd.decouple`` on real data: reported minus test error along the way.

CIFAR-10 features (n = 3000, d = 1280, k = 32) and noisy MNIST (n = 2000, d = 784, k = 16), GELU, a
whole two-layer network by one optimizer, or Muon for the first matrix and AdamW for the rest. Means
over seeds and over looks, one every fifth pass, of the signed gaps of error and loss; plain
training beside it. Needs ``DD_DATA`` or ``data.root`` as the experiments do.

    python benchmarks/optimizers_on_data.py [features mnist] [--rules AdamW] [--head] [--batch 100]
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _followed import figures, reported_figures
from torch import nn, optim

import dd
from dd.data import cifar10_probe, noisy_mnist
from dd.data.split import Split

EVERY = 5
WIDTHS = {"features": 32, "mnist": 16}

Make = Callable[[nn.Sequential], list[optim.Optimizer]]

RULES: dict[str, Make] = {
    "AdamW": lambda m: [optim.AdamW(m.parameters(), lr=1e-3)],
    "Adam": lambda m: [optim.Adam(m.parameters(), lr=1e-3)],
    "NAdam": lambda m: [optim.NAdam(m.parameters(), lr=1e-3)],
    "SGD": lambda m: [optim.SGD(m.parameters(), lr=0.02, momentum=0.9)],
    "Muon": lambda m: [
        optim.Muon([m[0].weight], lr=0.02),
        optim.AdamW([m[0].bias, *m[2].parameters()], lr=1e-3),
    ],
}


def data_of(problem: str, seed: int) -> Split:
    """Training and test samples."""
    if problem == "features":
        return cifar10_probe(num_train=3000, num_test=2000, seed=seed)
    return noisy_mnist(num_train=2000, num_test=5000, seed=seed)


def run(
    problem: str, rule: str, seed: int, options: argparse.Namespace, *, followed: bool
) -> dict[str, float]:
    """Train once; returns the mean signed gaps of error and loss, and the lowest test error."""
    split = data_of(problem, seed)
    train = split.train_inputs, split.train_targets
    test = split.test_inputs, split.test_targets
    torch.manual_seed(100 + seed)
    width, classes = WIDTHS[problem], int(split.train_targets.max()) + 1
    model = nn.Sequential(nn.Linear(train[0].shape[1], width), nn.GELU(), nn.Linear(width, classes))
    optimizers = RULES[rule](model)
    tracker = None
    if followed:
        noise = dd.NoiseModel.fit(train[0], split.train_components)
        tracker = dd.decouple(model, *optimizers, noise=noise, head=options.head)
    shuffle = torch.Generator().manual_seed(seed)
    gaps, best = [], 1.0
    for epoch in range(options.passes):
        parts: list[Any] = [slice(None)]
        if options.batch is not None:
            parts = list(torch.randperm(len(train[0]), generator=shuffle).split(options.batch))
        for rows in parts:
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
        if epoch % EVERY == EVERY - 1:
            reported = reported_figures(tracker, model, train)
            model.eval()
            with torch.no_grad():
                true = figures(model, test)
            model.train()
            gaps.append((reported - true).tolist())
            best = min(best, float(true[0]))
    error, loss = (statistics.mean(gap[at] for gap in gaps) for at in (0, 1))
    return {"error": error, "loss": loss, "best": best}


def main() -> int:
    """Print a row for each problem and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", choices=[*WIDTHS, []], metavar="PROBLEM")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=["AdamW"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, help="samples of a step; all by default")
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--head", action="store_true", help="correct the head too")
    options = parser.parse_args()
    heads = ["data", "optimizer", "error gap, plain", "error gap", "loss gap, plain", "loss gap"]
    heads += ["best test error, plain", "best test error", "warnings"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for problem in options.problems or WIDTHS:
        for rule in options.rules:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                seeds = range(options.seeds)
                found = [run(problem, rule, s, options, followed=True) for s in seeds]
            plain = [run(problem, rule, s, options, followed=False) for s in seeds]
            cells = [problem, rule]
            for key, form in (("error", "+.4f"), ("loss", "+.3f"), ("best", ".4f")):
                cells += [
                    f"{statistics.mean(one[key] for one in of):{form}}" for of in (plain, found)
                ]
            cells.append(" ".join(sorted({w.category.__name__ for w in told})))
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
