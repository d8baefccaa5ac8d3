"""Draw Q-Q plots of training pre-activations, whitened within their components, against N(0, 1).

After some steps the corrected pre-activations R = XW + Q of decoupled descent should be, in every
component, Gaussian with the means M and covariance K that state evolution predicts from the very
start of the run; XW without the correction should not. There is no prediction for plain gradient
descent: its XW is held against the exact law of a fresh sample given its weights, N(Wᵀμ_a, WᵀW).
Drawn is the leading principal coordinate of K, one curve a component (upper row), and less the
normal quantiles (lower row), in the pointwise 99 % band of as many independent normal numbers. The
table is of all coordinates, and holds decoupled descent against the law given its weights as well,
which knows of the run's own finite size. The layer's bias is left out everywhere.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _drawing import canvas, count, explained, options, save, show
from _gaussianity import Law, Sample, band, distance, ranks, whitened
from _xor import Xor, noise
from scipy import stats
from torch import Tensor, nn

import dd
from dd.data import Split
from dd.support.files import write_json
from dd.support.progress import progress_bar

PREDICTED, OWN = "state evolution", "fresh sample, given W"
# Panels: optimizer, pre-activations, the law they are held against, heading.
PANELS = (
    ("dd", "corrected", PREDICTED, "DD, corrected XW + Q"),
    ("dd", "uncorrected", PREDICTED, "DD, uncorrected XW"),
    ("gd", "uncorrected", OWN, "Gradient descent, XW"),
)
# Of the four components, two a label.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")
COMPONENTS = (r"$+\mu_a$", r"$-\mu_a$", r"$+\mu_b$", r"$-\mu_b$")


Samples = dict[tuple[str, str, str], Sample]


def trained(problem: Xor, start: nn.Sequential, split: Split, name: str) -> dict[str, Tensor]:
    """Weights (d, k) and pre-activations (n, k) after training."""
    model = deepcopy(start)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr)
    if name == "dd":
        optimizer = dd.DecoupledDescent(model, lr=problem.lr, noise=noise(split))
    with progress_bar(name, problem.steps, show=True) as advance:
        for _ in range(problem.steps):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train_inputs), split.train_targets).backward()
            optimizer.step()
            advance(1)
    weight = model[0].weight.detach().T
    found = {"weight": weight, "uncorrected": split.train_inputs @ weight}
    if isinstance(optimizer, dd.DecoupledDescent):
        found["corrected"] = found["uncorrected"] + optimizer.shadow.sum(0)
    return found


def samples(problem: Xor, seed: int, paths: int) -> Samples:
    """Whitened coordinates of each optimizer's pre-activations under each law."""
    split = problem.split(seed)
    start, mixture = problem.model(seed, split), split.mixture
    theory = dd.state_evolution(
        start,
        mixture,
        alpha=problem.alpha,
        steps=problem.steps,
        lr=problem.lr,
        paths=paths,
        replicates=2,
        record_every=problem.steps,
        progress=True,
    )
    predicted = Law(theory.overlaps.mean[-1], theory.covariance.mean[-1])
    fresh, _, fresh_components = mixture.sample(problem.num_train, torch.Generator().manual_seed(1))
    found = {}
    for name in ("dd", "gd"):
        run = trained(problem, start, split, name)
        weight = run.pop("weight").double()
        own = Law(mixture.means.double() @ weight, weight.T @ weight)
        rows = {kind: (values, split.train_components) for kind, values in run.items()}
        rows["fresh sample"] = (fresh.double() @ weight, fresh_components)
        for kind, (values, components) in rows.items():
            found[name, kind, OWN] = whitened(values, components, own)
            if name == "dd":
                found[name, kind, PREDICTED] = whitened(values, components, predicted)
    return found


def moments(found: Samples) -> list[dict[str, Any]]:
    """How far each sample is from N(0, 1)."""
    rows = []
    for (name, kind, law), sample in found.items():
        pooled = sample.values.ravel()
        rows.append(
            {
                "optimizer": name,
                "preactivation": kind,
                "law": law,
                "deviation": float(pooled.std()),
                "kurtosis": float(stats.kurtosis(pooled)),
                "ks": distance(pooled),
                "leading_shift": max(abs(float(part.mean())) for part in sample.leading),
                "leading_ks": float(np.mean([distance(part) for part in sample.leading])),
            }
        )
    return rows


def quantiles(found: Samples) -> list[dict[str, Any]]:
    """Some order statistics of what is drawn, and the band of a normal sample."""
    columns = ("normal", "sample", "low", "high")
    rows = []
    for name, kind, law, _ in PANELS:
        for component, values in enumerate(found[name, kind, law].leading):
            rank = ranks(len(values))
            normal = stats.norm.ppf((rank - 0.5) / len(values))
            points = zip(normal, values[rank - 1], *band(len(values), rank), strict=True)
            same = {"optimizer": name, "preactivation": kind, "law": law, "component": component}
            rows += [same | dict(zip(columns, map(float, point), strict=True)) for point in points]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, whiten, print, draw."""
    parser = options(__doc__, "qq", steps=100)
    parser.add_argument("--dimension", type=count, default=2000, help="d; n is 4 d")
    parser.add_argument("--paths", type=count, default=100_000, help="of state evolution")
    args = parser.parse_args(arguments)
    problem = Xor(args.dimension, lr=args.lr, steps=args.steps, num_test=1)
    with explained(parser):
        found = samples(problem, args.seed, args.paths)
    rows, table = quantiles(found), moments(found)
    with canvas(7, 4.6) as figure:
        axes = figure.subplots(2, 3, sharex=True, sharey="row", height_ratios=(3, 2))
        for column, (name, kind, law, title) in zip(axes.T, PANELS, strict=True):
            own = [row for row in rows if (row["optimizer"], row["preactivation"]) == (name, kind)]
            _panels(column, own)
            column[0].set_title(f"{title}\nlaw: {law}", loc="left")
        axes[0, 0].set_ylabel("leading coordinate, whitened")
        axes[1, 0].set_ylabel("the same, less normal")
        axes[0, 0].legend(loc="upper left")
        axes[1, 1].set_xlabel("standard normal quantile")
        figure.suptitle(
            f"Training pre-activations within components of XOR, n = {problem.num_train}, "
            f"d = {args.dimension}, after {args.steps} steps"
        )
        save(figure, args.out, rows)
    write_json(args.out.with_suffix(".json"), {"moments": table})
    show(table, args.out)


def _panels(axes, rows: list[dict[str, Any]]) -> None:
    for component, (colour, label) in enumerate(zip(COLOURS, COMPONENTS, strict=True)):
        own = [row for row in rows if row["component"] == component]
        names = ("normal", "sample", "low", "high")
        normal, sample, low, high = (np.array([row[name] for row in own]) for name in names)
        for panel, base in zip(axes, (np.zeros_like(normal), normal), strict=True):
            if component == 0:
                shown = {"color": "#BBBBBB", "linewidth": 0, "label": "99 % band"}
                panel.fill_between(normal, low - base, high - base, **shown)
            panel.plot(normal, sample - base, color=colour, linewidth=1.1, label=label)


if __name__ == "__main__":
    main()
