"""The train-test gap where a sample has several rows whose noise goes together, pooled.

XOR planted in two of P rows of a sample (‖μ‖ = 3, or 4 at ρ = 0.8, twice that where P > 8): k = 8
GELU units on every row, twice the mean or the maximum over rows, a linear head; d = 300, n = 1000
samples, η = 0.5, 150 full-batch steps. Rows of a sample correlate by ρ in every direction. Gradient
descent (GD), decoupled descent that takes rows for samples, and decoupled descent of whole samples,
by Stein's curvature and by a probe, start from the same weights. Gaps are means over looks every 5
steps of |train − test| error. Two samples of one source would differ by the floor,
0.8 √(p(1 − p)(1/n + 1/n_test)) at error p, here its mean over looks. Then groups: 300 of 4 rows
with a label each, batches of 60 rows, tested on new groups. Exits with 1 where the gap by Stein's
curvature is above 0.012 and above 1.3 times the floor, or nothing is learnt.

    python benchmarks/units.py [--rows 2 8] [--seeds 2] [--json out.json]
"""

import argparse
import json
import math
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd

DIMENSION, WIDTH, RATE, STEPS, EVERY = 300, 8, 0.5, 150, 5
SAMPLES, TEST_SAMPLES, GROUPS, GROUP_SIZE, GROUP_BATCH = 1000, 2000, 300, 4, 60
LEAST, LIMIT, LEARNT = 0.012, 1.3, 0.4
KINDS = ("gd", "rows", "stein", "probe")


@dataclass(frozen=True)
class Cell:
    """Rows of a sample, their correlation, and how they are pooled; groups are not."""

    rows: int
    correlation: float
    pooling: str


class Pooled(nn.Module):
    """A linear layer on every row, pooled behind the activation."""

    def __init__(self, pooling: str, *, flat: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(DIMENSION, WIDTH), nn.Linear(WIDTH, 2)
        self.pooling, self.flat = pooling, flat

    def forward(self, x: Tensor) -> Tensor:
        """Scores, shape (n, 2); of rows (N, d) that are samples, (N, 2)."""
        # Rows are then none of one sample's to the optimizer.
        rows = self.layer(x.flatten(0, -2)).view(*x.shape[:-1], -1) if self.flat else self.layer(x)
        hidden = F.gelu(rows)
        if self.pooling == "mean":
            hidden = 2 * hidden.mean(1)
        elif self.pooling == "max":
            hidden = hidden.amax(1)
        return self.head(hidden)


def draw(cell: Cell, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, P, d), labels (n,) and clusters (n,)."""
    clusters = torch.randint(4, (count,), generator=generator)
    labels, signs = clusters // 2, (2 * (clusters % 2) - 1).float()
    own = torch.randn(count, cell.rows, DIMENSION, generator=generator)
    common = torch.randn(count, 1, DIMENSION, generator=generator)
    inputs = math.sqrt(1 - cell.correlation) * own + math.sqrt(cell.correlation) * common
    size = (3.0 if cell.correlation < 0.6 else 4.0) * (1 if cell.rows <= 8 else 2)
    planted = range(cell.rows if cell.pooling == "none" else 2)
    for row in planted:
        inputs[torch.arange(count), row, labels] += size * signs
    return inputs, labels, clusters


def gaps(cell: Cell, kind: str, seed: int) -> tuple[float, float, float, float]:
    """Mean error gap, mean loss gap, lowest test error and mean floor of one run."""
    generator = torch.Generator().manual_seed(seed)
    grouped = cell.pooling == "none"
    inputs, labels, clusters = draw(cell, GROUPS if grouped else SAMPLES, generator)
    test_inputs, test_labels, _ = draw(cell, TEST_SAMPLES, generator)
    groups = torch.arange(len(inputs)).repeat_interleave(cell.rows)
    rows, of_rows = inputs.flatten(0, 1), clusters.repeat_interleave(cell.rows)
    if grouped:
        inputs, labels, test_inputs = rows, labels.repeat_interleave(cell.rows), test_inputs[:, 0]
    torch.manual_seed(seed)
    model = Pooled(cell.pooling, flat=kind == "rows" and not grouped)
    if kind == "gd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    else:
        if kind == "rows":
            noise = dd.NoiseModel.fit(rows, of_rows)
        elif grouped:
            noise = dd.NoiseModel.fit(rows, of_rows, groups=groups)
        else:
            noise = dd.NoiseModel.fit(inputs, clusters)
        curvature = "probe" if kind == "probe" else "stein"
        optimizer = dd.DecoupledDescent(
            model, lr=RATE, noise=noise, curvature=curvature, head=False
        )
    seen = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            seen.append(look(model, (inputs, labels), (test_inputs, test_labels)))
        some = torch.arange(len(inputs))
        if grouped:
            some = torch.randperm(len(inputs), generator=generator)[:GROUP_BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[some]), labels[some]).backward()
        optimizer.step()
    errors, losses, tests = zip(*seen, strict=True)
    mean = (statistics.fmean(map(abs, column)) for column in (errors, losses))
    count = 1 / (GROUPS if grouped else SAMPLES) + 1 / TEST_SAMPLES
    floors = [0.8 * math.sqrt(p * (1 - p) * count) for p in tests]
    return (*mean, min(tests), statistics.fmean(floors))


@torch.no_grad()
def look(
    model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    """Train less test error and loss, and the test error."""
    scores = model(train[0])
    model.eval()
    of_test = model(test[0])
    model.train()
    wrong = [
        float((found.argmax(1) != labels).double().mean())
        for found, labels in ((scores, train[1]), (of_test, test[1]))
    ]
    losses = [
        float(F.cross_entropy(found, y)) for found, y in ((scores, train[1]), (of_test, test[1]))
    ]
    return wrong[0] - wrong[1], losses[0] - losses[1], wrong[1]


def row(cell: Cell, seeds: int) -> dict[str, float | str]:
    """Means over seeds."""
    found: dict[str, float | str] = dict(asdict(cell))
    for kind in KINDS:
        runs = [gaps(cell, kind, seed) for seed in range(seeds)]
        columns = [statistics.fmean(column) for column in zip(*runs, strict=True)]
        for key, value in zip(("gap", "loss_gap", "test_error", "floor"), columns, strict=True):
            found[f"{kind}_{key}"] = value
    return found


def is_missed(found: dict[str, float | str]) -> bool:
    """Whether a gap is too large, or nothing was learnt."""
    gap, floor = float(found["stein_gap"]), float(found["stein_floor"])
    return gap > max(LEAST, LIMIT * floor) or float(found["stein_test_error"]) > LEARNT


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    correlations = (0.0, 0.4, 0.8)
    cells = [
        Cell(rows, correlation, pooling)
        for rows in arguments.rows
        for pooling in ("mean", "max")
        for correlation in correlations
    ]
    cells += [Cell(GROUP_SIZE, correlation, "none") for correlation in correlations[1:]]
    print(
        "| rows | pooling | ρ | floor | GD | rows as samples | DD, Stein | loss | DD, probe "
        "| lowest test error, GD | DD |"
    )
    print("|---|" + "---|" * 10)
    rows = []
    for cell in cells:
        found = row(cell, arguments.seeds)
        rows.append(found)
        keys = ("stein_floor", "gd_gap", "rows_gap", "stein_gap", "stein_loss_gap", "probe_gap")
        figures = [f"{float(found[key]):.4f}" for key in keys]
        figures += [f"{float(found[f'{kind}_test_error']):.3f}" for kind in ("gd", "stein")]
        print(
            f"| {cell.rows} | {cell.pooling} | {cell.correlation:g} |",
            " | ".join(figures),
            "|",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(any(map(is_missed, rows)))


if __name__ == "__main__":
    sys.exit(main())
