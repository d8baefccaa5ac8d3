"""The train-test gap of any optimizer on XOR, plain and followed by ``dd.decouple``.

d = 600, n = 2400, k = 8, GELU; the decoupled weight is the optimizer's, biases and head are SGD's
at 0.2. Means over seeds of |reported − test error| and loss over the looks, one every fifth pass,
and the lowest test error on the way. Two samples of one source would differ by about 0.006. Those
of other packages are left out where these are not installed.

    python benchmarks/optimizers.py [NAME ...] [--seeds 4] [--batch 200 --passes 30]
"""

import argparse
import importlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from _followed import figures, reported_figures
from torch import Tensor, nn, optim

import dd
from dd.data import xor
from dd.data.split import Split

INPUTS, SAMPLES, WIDTH, EVERY = 600, 2400, 8, 5

Make = Callable[[Iterable[Tensor]], optim.Optimizer]

RULES: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.3),
    "SGD-nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "ASGD": lambda p: optim.ASGD(p, lr=0.3),
    "AdamW": lambda p: optim.AdamW(p, lr=3e-3),
    "Adam": lambda p: optim.Adam(p, lr=3e-3),
    "NAdam": lambda p: optim.NAdam(p, lr=3e-3),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: optim.Adamax(p, lr=3e-3),
    "Adagrad": lambda p: optim.Adagrad(p, lr=2e-2),
    "Adadelta": lambda p: optim.Adadelta(p, lr=5.0),
    "RMSprop": lambda p: optim.RMSprop(p, lr=5e-4),
    "RMSprop-momentum": lambda p: optim.RMSprop(p, lr=5e-4, centered=True, momentum=0.9),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: optim.Muon(p, lr=2e-2),
    "Lion": lambda p: _of("lion_pytorch", "Lion")(p, lr=1e-3),
    "ScheduleFree-SGD": lambda p: _of("schedulefree", "SGDScheduleFree")(p, lr=0.5),
    "ScheduleFree-AdamW": lambda p: _of("schedulefree", "AdamWScheduleFree")(p, lr=3e-3),
    "Adam-mini": lambda p: _of("adam_mini", "Adam_mini")(
        [("hidden", one) for one in p], lr=3e-3, dim=INPUTS, n_heads=1, verbose=False
    ),
    "Prodigy": lambda p: _of("prodigyopt", "Prodigy")(p, lr=1.0),
    "SOAP": lambda p: _of("pytorch_optimizer", "SOAP")(p, lr=3e-3),
    "Shampoo": lambda p: _of("pytorch_optimizer", "Shampoo")(p, lr=3e-3),
    "AdEMAMix": lambda p: _of("pytorch_optimizer", "AdEMAMix")(p, lr=3e-3),
    "LARS": lambda p: _of("pytorch_optimizer", "LARS")(p, lr=0.3),
}


def _of(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def data_of(seed: int) -> Split:
    """Training and test samples."""
    return xor(dimension=INPUTS, num_train=SAMPLES, num_test=10_000, seed=seed)


def run(name: str, seed: int, passes: int, size: int | None, *, followed: bool) -> dict[str, Any]:
    """Train once; returns mean gaps of error and loss, the lowest test error, and the response."""
    split = data_of(seed)
    train, test = (
        (split.train_inputs, split.train_targets),
        (split.test_inputs, split.test_targets),
    )
    torch.manual_seed(100 + seed)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))
    optimizer: Any = RULES[name]([model[0].weight])
    rest = optim.SGD([model[0].bias, *model[2].parameters()], lr=0.2)
    tracker = None
    if followed:
        noise = dd.NoiseModel.fit(split.train_inputs, split.train_components)
        tracker = dd.decouple(model, optimizer, rest, noise=noise)
    shuffle = torch.Generator().manual_seed(seed)
    errors, losses, best = [], [], 1.0
    for epoch in range(passes):
        if hasattr(optimizer, "train"):
            optimizer.train()
        for rows in _batches(size, shuffle):
            optimizer.zero_grad()
            rest.zero_grad()
            F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            rest.step()
        if epoch % EVERY == EVERY - 1:
            if hasattr(optimizer, "eval"):
                optimizer.eval()
            reported = reported_figures(tracker, model, train)
            model.eval()
            with torch.no_grad():
                true = figures(model, test)
            model.train()
            error, loss = (reported - true).abs().tolist()
            errors.append(error)
            losses.append(loss)
            best = min(best, float(true[0]))
    response = None if tracker is None else tracker.response
    found = {"error": statistics.mean(errors), "loss": statistics.mean(losses), "best": best}
    return found | {"response": response}


def _batches(size: int | None, shuffle: torch.Generator) -> list[Tensor | slice]:
    if size is None:
        return [slice(None)]
    return list(torch.randperm(SAMPLES, generator=shuffle).split(size))


def main() -> int:
    """Print a row for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RULES)}")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch", type=int, help="samples of a step; all by default")
    parser.add_argument("--passes", type=int, default=150)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RULES]
    if unknown:
        parser.error(f"unknown optimizer {unknown[0]}; choose from {', '.join(RULES)}")
    heads = ["optimizer", "followed", "share", "error gap, plain", "error gap", "loss gap"]
    heads += ["best test error, plain", "best test error"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in options.names or RULES:
        try:
            plan = (options.passes, options.batch)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                runs = [run(name, s, *plan, followed=True) for s in range(options.seeds)]
            plain = [run(name, s, *plan, followed=False) for s in range(options.seeds)]
        except (ImportError, AttributeError) as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            continue
        print(_row(name, runs, plain, {w.category.__name__ for w in told}), flush=True)
    return 0


def _row(name: str, runs: list[dict[str, Any]], plain: list[dict[str, Any]], told: set[str]) -> str:
    def mean(of: list[dict[str, Any]], key: str) -> str:
        return f"{statistics.mean(one[key] for one in of):.4f}"

    response = runs[0]["response"]
    how = "exact" if response.exact else "regression"
    how += ", across units" * response.across_units + "".join(f", {w}" for w in sorted(told))
    cells = [name, how, f"{response.share:.2f}", mean(plain, "error"), mean(runs, "error")]
    cells += [mean(runs, "loss"), mean(plain, "best"), mean(runs, "best")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
