"""How far the training error may be believed, for gradient descent (GD) and decoupled descent (DD).

Each sweep changes one thing about the data, the network or the loss. Printed, as means over the
seeds: the gap |train − test| and the signed gap train − test, averaged over the trajectory, final
and best test error, and the sampling floor: an exact identity between a training set of n and a
test set of n_test samples at error p would leave 0.8 √(p(1 − p)(1/n + 1/n_test)). Noise models know
the mixture components unless stated. Rows of real data find it through DD_DATA and are skipped,
with a sentence, where it is absent.

    python benchmarks/when_to_trust.py [n_over_d width ...] [--seeds 4] [--json when_to_trust.json]
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
from dd.data import Split, cifar10_probe, generator, noisy_mnist, xor
from dd.experiments.models import ACTIVATIONS, two_layer

D = 500  # of synthetic data


@dataclass(frozen=True)
class Task:
    """One setting at one seed.

    Attributes:
        train: inputs (n, d) and targets (n,), or (n, 1) in regression.
        test: the same of fresh samples.
        model: network at its initial weights; copied for each optimizer.
        noise: noise model of DD.
        settings: learning rate and the like of both optimizers.
        steps: full-batch updates.
        curvature: of DD.
        square: half mean squared error in place of cross-entropy.
        weights: of the training samples in the loss and in the error, shape (n,).
        head: whether DD corrects the head too.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: nn.Sequential
    noise: dd.NoiseModel
    settings: dict[str, float]
    steps: int
    curvature: str = "auto"
    square: bool = False
    weights: Tensor | None = None
    head: bool = False


@dataclass
class Curves:
    """Losses and errors along one trajectory, and the kinds of warnings on the way."""

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    train_error: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    warned: dict[str, int] = field(default_factory=dict)


# --- The loop ------------------------------------------------------------------------------------


def run(task: Task, *, decoupled: bool, looks: int = 30) -> Curves:
    """Train and look; stops where the loss has grown beyond 10⁶."""
    torch.manual_seed(0)
    model, curves = copy.deepcopy(task.model), Curves()
    optimizer = (
        dd.DecoupledDescent(
            model, noise=task.noise, curvature=task.curvature, head=task.head, **task.settings
        )
        if decoupled
        else torch.optim.SGD(model.parameters(), **task.settings)
    )
    for step in range(task.steps + 1):
        if step % max(1, task.steps // looks) == 0:
            _look(task, model, curves)
            if not curves.train_loss[-1] < 1e6:
                break
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            # The gradients are cleared before every step, which is what this warning asks for.
            warnings.filterwarnings("ignore", message=".*create_graph=True.*")
            optimizer.zero_grad()
            loss = _loss(task, model(task.train[0]), task.train[1], task.weights)
            loss.backward(create_graph=getattr(optimizer, "needs_graph", False))
            optimizer.step()
        for warning in caught:
            curves.warned.setdefault(warning.category.__name__, step)
    return curves


@torch.no_grad()
def _look(task: Task, model: nn.Sequential, curves: Curves) -> None:
    train = model(task.train[0])
    model.eval()
    test = model(task.test[0])
    model.train()
    for name, outputs, targets, weights in (
        ("train", train, task.train[1], task.weights),
        ("test", test, task.test[1], None),
    ):
        loss = float(_loss(task, outputs, targets, weights))
        getattr(curves, f"{name}_loss").append(loss)
        # A regression is judged by its mean squared error.
        wrong = 2 * loss if task.square else _error(outputs, targets, weights)
        getattr(curves, f"{name}_error").append(wrong)


def _loss(task: Task, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if task.square:
        return 0.5 * (outputs - targets).square().mean()
    if weights is None:
        return F.cross_entropy(outputs, targets)
    return F.cross_entropy(outputs, targets, reduction="none") @ weights / weights.sum()


def _error(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> float:
    wrong = (outputs.argmax(1) != targets).double()
    return float(wrong.mean() if weights is None else wrong @ weights.double() / weights.sum())


# --- What is said about a trajectory --------------------------------------------------------------


def figures(task: Task, curves: Curves) -> dict[str, float]:
    """The numbers of one trajectory."""
    # The common start says nothing: GD has no gap there either.
    errors = _differences(curves.train_error[1:], curves.test_error[1:], relative=task.square)
    losses = _differences(curves.train_loss[1:], curves.test_loss[1:])
    found = {
        "error_gap": _mean_absolute(errors),
        "signed_error_gap": statistics.fmean(errors),
        "loss_gap": _mean_absolute(losses),
        "signed_loss_gap": statistics.fmean(losses),
        "final_train_error": curves.train_error[-1],
        "final_test_error": curves.test_error[-1],
        "best_test_error": min(curves.test_error),
        "floor": statistics.fmean(_floor(task, p) for p in curves.test_error[1:]),
    }
    return found | {f"warned_{name}": step for name, step in curves.warned.items()}


def _differences(train: list[float], test: list[float], *, relative: bool = False) -> list[float]:
    return [(a - b) / (b if relative else 1) for a, b in zip(train, test, strict=True)]


def _mean_absolute(values: list[float]) -> float:
    return statistics.fmean(abs(v) for v in values)


def _floor(task: Task, error: float) -> float:
    inverse = 1 / len(task.train[1]) + 1 / len(task.test[1])
    # The mean of a sum of squared Gaussian residuals has relative variance 2/n.
    variance = 2.0 if task.square else error * (1 - error)
    return 0.8 * math.sqrt(variance * inverse)


# --- Data ----------------------------------------------------------------------------------------


def xor_task(
    seed: int, n: int = 2 * D, width: int = 8, noise: Callable[..., Any] | None = None, **how: Any
) -> Task:
    """XOR: four clusters of norm 2.5 in D dimensions, GELU, rate 0.25, 200 steps."""
    split = xor(dimension=D, num_train=n, num_test=5000, seed=seed)
    return _classification(split, seed, width, noise or dd.NoiseModel.isotropic, **how)


def features_task(
    seed: int, n: int = 3000, width: int = 32, scaling: str = "coordinate", **how: Any
) -> Task:
    """CIFAR-10 features, d = 1280, GELU, rate 0.05, 200 steps, fitted spectrum.

    The test samples are the same 2000 at every seed, and with n = 8000 so are the training ones.
    """
    split = cifar10_probe(
        source="features",
        num_train=n,
        num_test=2000,
        scaling=scaling,
        seed=seed,
        progress=False,
    )
    how = {"lr": 0.05, "scale": 1.0} | how
    return _classification(split, seed, width, dd.NoiseModel.fit, **how)


def mnist_task(seed: int, n: int = 2000, width: int = 16, **how: Any) -> Task:
    """Noisy MNIST, d = 784, tanh, rate 0.2, 200 steps, isotropic noise without head correction."""
    split = noisy_mnist(num_train=n, num_test=5000, seed=seed, download=False)
    how = {"lr": 0.2, "scale": 1.0, "activation": "tanh"} | how
    return _classification(split, seed, width, dd.NoiseModel.isotropic, **how)


def _classification(
    split: Split,
    seed: int,
    width: int,
    noise: Callable[..., dd.NoiseModel],
    *,
    lr: float = 0.25,
    momentum: float = 0.0,
    steps: int = 200,
    scale: float = 0.5,
    activation: str = "gelu",
    depth: int = 1,
    head: bool = False,
) -> Task:
    source = generator(seed, "initialisation")
    model = two_layer(
        split.dimension,
        width,
        split.num_classes,
        activation=activation,
        hidden_scale=scale,
        generator=source,
    )
    middle: list[nn.Module] = []
    for _ in range(depth - 1):
        middle += [_linear(width, width, source), ACTIVATIONS[activation]()]
    model = nn.Sequential(*model[:2], *middle, model[2])
    return Task(
        train=(split.train_inputs, split.train_targets),
        test=(split.test_inputs, split.test_targets),
        model=model,
        noise=(
            dd.NoiseModel.fit(split.train_inputs, split.train_components, separate_means=True)
            if head
            else noise(split.train_inputs, split.train_components)
        ),
        settings={"lr": lr, "momentum": momentum},
        steps=steps,
        head=head,
    )


def _linear(inputs: int, outputs: int, source: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    # Twice 1/k keeps the size of the signal through a rectifying activation.
    nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs), generator=source)
    nn.init.zeros_(layer.bias)
    return layer


# --- Sweeps --------------------------------------------------------------------------------------

Row = tuple[str, Callable[[int], Task]]


def n_over_d() -> Iterator[Row]:
    """Samples per input dimension."""
    for ratio in (0.3, 0.5, 1.0, 2.0, 4.0, 10.0):
        yield f"XOR, n/d = {ratio:g}", lambda seed, r=ratio: xor_task(seed, int(r * D))
    for n in (300, 400, 1000, 3000, 8000):
        yield (
            f"features, n = {n}, n/d = {n / 1280:.2g}",
            lambda seed, n=n: features_task(seed, n),
        )


def width() -> Iterator[Row]:
    """Width k of the decoupled layer."""
    for k in (4, 16, 64, 128, 256):
        yield f"XOR, n = 1000, {_sizes(k, 2, 1000)}", lambda seed, k=k: xor_task(seed, 1000, k)
    for k in (4, 16, 64, 256):
        label = f"noisy MNIST, n = 1000, {_sizes(k, 10, 1000)}"
        yield label, lambda seed, k=k: mnist_task(seed, 1000, k)
    for k in (8, 32, 128):
        label = f"features, n = 1000, {_sizes(k, 10, 1000)}"
        yield label, lambda seed, k=k: features_task(seed, 1000, k)


def _sizes(k: int, outputs: int, n: int) -> str:
    head = k + (k + 1) * outputs
    return f"k = {k}, k²/n = {k * k / n:.2g}, head/n = {head / n:.2g}"


def head() -> Iterator[Row]:
    """The last layer corrected for its own over-fitting, or not."""
    settings: list[tuple[str, Callable[..., Task], dict[str, Any]]] = [
        ("XOR, n = 1000, k = 8", xor_task, {}),
        ("XOR, n = 1000, k = 64", xor_task, {"width": 64}),
        (
            "noisy MNIST, n = 2000, k = 64, ReLU",
            mnist_task,
            {"width": 64, "activation": "relu", "steps": 300},
        ),
        ("features, n = 300, k = 32", features_task, {"n": 300, "steps": 300}),
        ("features, n = 1000, k = 32", features_task, {"n": 1000, "steps": 300}),
        ("features, n = 1000, k = 64", features_task, {"n": 1000, "width": 64, "steps": 300}),
        ("features, n = 3000, k = 32", features_task, {"steps": 300}),
    ]
    for label, build, how in settings:
        for corrected in (False, True):
            yield (
                f"{label}, head {'corrected' if corrected else 'as it is'}",
                lambda seed, b=build, h=how, c=corrected: b(seed, head=c, **h),
            )


def scaling() -> Iterator[Row]:
    """Features scaled coordinate by coordinate, or all by one number."""
    for n in (300, 1000):
        for way in ("coordinate", "global"):
            for corrected in (False, True):
                yield (
                    f"features, n = {n}, {way} scaling, head "
                    f"{'corrected' if corrected else 'as it is'}",
                    lambda seed, n=n, w=way, c=corrected: features_task(
                        seed, n, scaling=w, head=c, steps=300
                    ),
                )


def heavy_tails() -> Iterator[Row]:
    """Elliptical noise: Student's t, scaled to unit variance."""
    for freedom in (3.0, 5.0, 10.0, math.inf):
        for per_sample in (False, True):
            mass = "own mass of each sample" if per_sample else "one mass"
            yield (
                f"XOR, t with {freedom:g} degrees of freedom, {mass}",
                lambda seed, f=freedom, p=per_sample: _elliptical(seed, f, p),
            )


def _elliptical(seed: int, freedom: float, per_sample: bool) -> Task:
    def noise(inputs: Tensor, components: Tensor) -> dd.NoiseModel:
        return dd.NoiseModel.fit(inputs, components, bins=1, per_sample=per_sample)

    n, n_test = 2 * D, 5000
    plain = xor(dimension=D, num_train=n, num_test=n_test, seed=seed)
    means = xor(dimension=D, num_train=n, num_test=n_test, noise=0.0, seed=seed)
    source = generator(seed, "data/scales")
    stretched = [
        centre + (noisy - centre) * _scales(len(noisy), freedom, source)
        for noisy, centre in (
            (plain.train_inputs, means.train_inputs),
            (plain.test_inputs, means.test_inputs),
        )
    ]
    split = dataclasses.replace(plain, train_inputs=stretched[0], test_inputs=stretched[1])
    return _classification(split, seed, 8, noise)


def _scales(count: int, freedom: float, source: torch.Generator) -> Tensor:
    """Square roots of ν/χ²_ν over its mean ν/(ν − 2), shape (count, 1)."""
    if math.isinf(freedom):
        return torch.ones(count, 1)
    chi = torch.randn(count, int(freedom), generator=source).square().sum(1, keepdim=True)
    return ((freedom - 2) / chi).sqrt()


def label_noise() -> Iterator[Row]:
    """A share of the labels replaced by another class, in training and test alike."""
    for share in (0.0, 0.1, 0.3):
        yield f"XOR, {share:.0%} flipped", lambda s, p=share: _flipped(xor_task(s), p, s)
    for share in (0.0, 0.1, 0.3):
        label = f"features, n = 1000, {share:.0%} flipped, components are the"
        for known in (True, False):
            if known or share:
                yield (
                    f"{label} {'true classes' if known else 'noisy labels'}",
                    lambda s, p=share, k=known: _flipped(features_task(s, 1000), p, s, known=k),
                )


def _flipped(task: Task, share: float, seed: int, *, known: bool = True) -> Task:
    source = generator(seed, "data/flips")
    train, test = ((x, _flip(y, share, source)) for x, y in (task.train, task.test))
    noise = task.noise if known else dd.NoiseModel.fit(*train)
    return dataclasses.replace(task, train=train, test=test, noise=noise)


def _flip(targets: Tensor, share: float, source: torch.Generator) -> Tensor:
    classes = 1 + int(targets.max())
    others = (targets + torch.randint(1, classes, targets.shape, generator=source)) % classes
    return torch.where(torch.rand(len(targets), generator=source) < share, others, targets)


def imbalance() -> Iterator[Row]:
    """Unequal classes, in training and test alike."""
    for ratio in (1, 4, 20):
        yield f"XOR, n = 1000, 1:{ratio}", lambda seed, r=ratio: _unequal(seed, r)


def _unequal(seed: int, ratio: int) -> Task:
    n = 2 * D
    split = xor(dimension=D, num_train=3 * n, num_test=12000, seed=seed)
    kept = [
        _thinned(y, ratio, m) for y, m in ((split.train_targets, n), (split.test_targets, 5000))
    ]
    assert split.train_components is not None
    split = Split(
        train_inputs=split.train_inputs[kept[0]],
        train_targets=split.train_targets[kept[0]],
        train_components=split.train_components[kept[0]],
        test_inputs=split.test_inputs[kept[1]],
        test_targets=split.test_targets[kept[1]],
    )
    return _classification(split, seed, 8, dd.NoiseModel.isotropic)


def _thinned(targets: Tensor, ratio: int, count: int) -> Tensor:
    """Positions of ``count`` samples, one of class 1 for ``ratio`` of class 0."""
    rare = round(count / (1 + ratio))
    zeros, ones = ((targets == label).nonzero().flatten() for label in (0, 1))
    return torch.cat([zeros[: count - rare], ones[:rare]])


def duplicates() -> Iterator[Row]:
    """A share of the training rows are exact copies of other rows."""
    for share in (0.0, 0.05, 0.2, 0.5):
        yield f"XOR, n = 1000, {share:.0%} copies", lambda seed, p=share: _copied(seed, p)
    for share in (0.0, 0.2, 0.5):
        yield f"XOR, n = 4000, {share:.0%} copies", lambda s, p=share: _copied(s, p, 4000)
    for n in (1000, 4000):
        yield (
            f"XOR, n = {n}, 50% copies, merged into weights",
            lambda s, n=n: _copied(s, 0.5, n, merged=True),
        )


def _copied(seed: int, share: float, n: int = 2 * D, *, merged: bool = False) -> Task:
    split = xor(dimension=D, num_train=n, num_test=5000, seed=seed)
    assert split.train_components is not None
    fresh = n - round(share * n)
    rows = torch.arange(n)
    rows[fresh:] = torch.randint(fresh, (n - fresh,), generator=generator(seed, "data/copies"))
    weights = torch.bincount(rows, minlength=fresh).float() if merged else None
    rows = rows[:fresh] if merged else rows
    split = dataclasses.replace(
        split,
        train_inputs=split.train_inputs[rows],
        train_targets=split.train_targets[rows],
        train_components=split.train_components[rows],
    )
    task = _classification(split, seed, 8, dd.NoiseModel.isotropic)
    return dataclasses.replace(task, weights=weights)


def depth() -> Iterator[Row]:
    """Hidden layers, the decoupled one counted in."""
    for layers in (1, 2, 3):
        for n in (1000, 4000):
            yield (
                f"XOR, n = {n}, {layers} hidden layer{'s' * (layers > 1)} of 8",
                lambda seed, m=layers, n=n: xor_task(seed, n, depth=m, lr=0.1, steps=400),
            )
    for layers in (1, 2, 3):
        yield (
            f"noisy MNIST, n = 2000, {layers} hidden layer{'s' * (layers > 1)} of 16",
            lambda seed, m=layers: mnist_task(seed, depth=m, lr=0.1, steps=300),
        )


def regression() -> Iterator[Row]:
    """Square loss; errors are mean squared ones, error gaps relative to the test error.

    The noise of the targets alone is an error of 0.25.
    """
    for name, width, decay in (("linear", 0, 2.0), ("two layers", 8, 0.2)):
        for ratio in (0.3, 0.5, 0.8, 1.5, 3.0):
            for share in (0.0, decay) if ratio < 1 else (0.0,):
                yield (
                    f"{name}, n/d = {ratio:g}" + (f", weight decay {share:g}x*" if share else ""),
                    lambda seed, r=ratio, w=width, s=share: _regression(seed, r, w, s),
                )


def _regression(seed: int, ratio: float, width: int, decay: float) -> Task:
    """Y = Xβ + 0.5 noise, ‖β‖ ≈ 1; ``decay`` in units of x*.

    Linear: rate 0.05, 200 steps. Two layers, GELU: rate 0.1, 400 steps.
    """
    source, n = generator(seed, "data/regression"), int(ratio * D)
    beta = torch.randn(D, 1, generator=source) / math.sqrt(D)
    inputs = torch.randn(n + 5000, D, generator=source)
    targets = inputs @ beta + 0.5 * torch.randn(n + 5000, 1, generator=source)
    model = nn.Sequential(nn.Linear(D, 1))
    if width:
        model = two_layer(D, width, 1, generator=generator(seed, "initialisation"))
    else:
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    growth = max(0.0, math.sqrt(1 / ratio) - 1)
    return Task(
        train=(inputs[:n], targets[:n]),
        test=(inputs[n:], targets[n:]),
        model=model,
        noise=dd.NoiseModel.isotropic(inputs[:n]),
        settings={"lr": 0.1 if width else 0.05, "weight_decay": decay * growth},
        steps=400 if width else 200,
        curvature="probe_create_graph",
        square=True,
    )


def few_samples() -> Iterator[Row]:
    """Cross-entropy with fewer samples than inputs, at several rates."""
    for ratio in (0.3, 0.5, 0.8):
        for lr, momentum, steps in ((0.1, 0.0, 600), (0.5, 0.0, 200), (0.05, 0.9, 300)):
            yield (
                f"XOR, n/d = {ratio:g}, rate {lr:g}, momentum {momentum:g}, {steps} steps",
                lambda seed, r=ratio, m=momentum, lr=lr, steps=steps: xor_task(
                    seed, int(r * D), lr=lr, momentum=m, steps=steps
                ),
            )


SWEEPS: dict[str, Callable[[], Iterator[Row]]] = {
    sweep.__name__: sweep
    for sweep in (
        n_over_d,
        width,
        head,
        scaling,
        heavy_tails,
        label_noise,
        imbalance,
        duplicates,
        depth,
        regression,
        few_samples,
    )
}


# --- Printing ------------------------------------------------------------------------------------

COLUMNS = (
    "setting",
    "floor",
    "GD error gap",
    "DD error gap",
    "DD signed",
    "GD loss gap",
    "DD loss gap",
    "GD test error: final / best",
    "DD test error: final / best",
    "warnings",
)


def measure(label: str, build: Callable[[int], Task], seeds: int) -> dict[str, Any]:
    """Train both optimizers at every seed; returns means, standard deviations and single runs."""
    runs: dict[str, list[dict[str, float]]] = {"gd": [], "dd": []}
    for seed in range(seeds):
        print(f"\r{label}: seed {seed + 1} of {seeds}\033[K", end="", file=sys.stderr, flush=True)
        task = build(seed)
        for name in runs:
            runs[name].append(figures(task, run(task, decoupled=name == "dd")))
    print("\r\033[K", end="", file=sys.stderr)
    return {"setting": label, **{k: _summary(v) for k, v in runs.items()}, "runs": runs}


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    keys = [k for k in runs[0] if not k.startswith("warned")]
    return {k: statistics.fmean(r[k] for r in runs) for k in keys}


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    gd, ours = row["gd"], row["dd"]
    return [
        row["setting"],
        _number(ours["floor"]),
        _number(gd["error_gap"]),
        _number(ours["error_gap"]),
        f"{ours['signed_error_gap']:+.3g}",
        _number(gd["loss_gap"]),
        _number(ours["loss_gap"]),
        f"{_number(gd['final_test_error'])} / {_number(gd['best_test_error'])}",
        f"{_number(ours['final_test_error'])} / {_number(ours['best_test_error'])}",
        _warned(row["runs"]["dd"]),
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _warned(runs: list[dict[str, float]]) -> str:
    names = sorted({k for r in runs for k in r if k.startswith("warned_")})
    said = []
    for name in names:
        steps = [int(r[name]) for r in runs if name in r]
        where = f"{min(steps)}–{max(steps)}" if len(set(steps)) > 1 else f"{steps[0]}"
        said.append(f"{name.removeprefix('warned_')}, {len(steps)}/{len(runs)}, step {where}")
    return "; ".join(said)


def main() -> int:
    """Run the sweeps, print a table for each, and write everything as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*", metavar="sweep", help=", ".join(SWEEPS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("when_to_trust.json"))
    arguments = parser.parse_args()
    unknown = set(arguments.sweeps) - set(SWEEPS)
    if unknown:
        parser.error(f"no sweep {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    torch.set_num_threads(1)
    found = {name: sweep(name, arguments.seeds) for name in arguments.sweeps or SWEEPS}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def sweep(name: str, seeds: int) -> list[dict[str, Any]]:
    """Run one sweep and print its table."""
    print(f"\n### {name}: {(SWEEPS[name].__doc__ or '').splitlines()[0]}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    rows = []
    for label, build in SWEEPS[name]():
        try:
            row = measure(label, build, seeds)
        except FileNotFoundError as error:
            print(f"skipped {label}: {error}", file=sys.stderr)
            continue
        print(f"| {' | '.join(cells(row))} |", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
