"""The head's correction against retraining without a sample, with and without its cross term.

CIFAR-10 features (found through DD_DATA), d = 1280, k = 32, GELU, rate 0.05. Some samples in turn
weigh nothing in the loss; what that does to their pre-activation and, through the head, to their
scores is compared with the shadows: *slope* of the change on the prediction (1 is right), and their
correlation. Without the cross term the curvature of layer and head is block-diagonal.

    python benchmarks/leave_one_out_head.py [--samples 300] [--left-out 40] [--json FILE]
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
import dd.correction.head
from dd.data import Split, cifar10_probe, generator
from dd.experiments.models import two_layer
from dd.functional import shared_curvature

STEPS = (50, 150, 300)
WIDTH = 32

State = tuple[nn.Sequential, Tensor, Tensor, Tensor]


def block_diagonal(*parts: Tensor) -> Tensor:
    """The curvature of the shared parameters without its cross term."""
    curvature = shared_curvature(*parts)
    split = parts[1].shape[-1] * parts[2].shape[-1]
    curvature[..., :split, split:] = curvature[..., split:, :split] = 0
    return curvature


def train(split: Split, noise: dd.NoiseModel, weights: Tensor) -> dict[int, State]:
    """Model, R − XW, features of the head and its change of the scores, at each of STEPS."""
    model = two_layer(split.dimension, WIDTH, 10, generator=generator(0, "initialisation"))
    optimizer = dd.DecoupledDescent(model, lr=0.05, noise=noise, head=True)
    found: dict[int, State] = {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            found[step] = _look(model, split.train_inputs)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(split.train_inputs), split.train_targets, reduction="none")
        (losses @ weights / len(weights)).backward()
        optimizer.step()
    optimizer.detach()
    return found


@torch.no_grad()
def _look(model: nn.Sequential, inputs: Tensor) -> State:
    corrected = model[0](inputs)
    features = model[1](corrected)
    scores = model[2](features)
    model.eval()
    shadow = corrected - model[0](inputs)
    change = scores - model[2](features)
    model.train()
    # A copy is the plain network in either mode.
    return copy.deepcopy(model), shadow, features, change


def compare(split: Split, rows: list[int]) -> dict[int, dict[str, float]]:
    """Slopes and correlations over the samples ``rows``, at each of STEPS."""
    everything = torch.ones(len(split.train_inputs))
    noise = dd.NoiseModel.fit(split.train_inputs, split.train_components, separate_means=True)
    full = train(split, noise, everything)
    moved: dict[int, list[tuple[Tensor, Tensor]]] = {step: [] for step in STEPS}
    for number, row in enumerate(rows):
        print(f"\r{number + 1} of {len(rows)}\033[K", end="", file=sys.stderr, flush=True)
        weights = everything.clone()
        weights[row] = 0
        without = train(split, noise, weights)
        for step in STEPS:
            (there, *_), (here, _, features, _) = without[step], full[step]
            x, phi = split.train_inputs[row], features[row]
            with torch.no_grad():
                moved[step].append((there[0](x) - here[0](x), there[2](phi) - here[2](phi)))
    print("\r\033[K", end="", file=sys.stderr)
    result = {}
    for step in STEPS:
        _, shadow, _, change = full[step]
        layer, head = (torch.stack(part) for part in zip(*moved[step], strict=True))
        result[step] = _match("layer", shadow[rows], layer) | _match("head", change[rows], head)
    return result


def _match(name: str, predicted: Tensor, found: Tensor) -> dict[str, float]:
    product = float((predicted * found).sum())
    return {
        f"{name}_slope": product / float(predicted.square().sum()),
        f"{name}_correlation": product / float(predicted.norm() * found.norm()),
    }


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--left-out", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split = cifar10_probe(source="features", num_train=arguments.samples, progress=False)
    rows = torch.randperm(arguments.samples, generator=generator(0, "left out"))
    variants: dict[str, Callable[..., Tensor]] = {
        "with": shared_curvature,
        "without": block_diagonal,
    }
    found: dict[str, Any] = {}
    print("| cross term | step | layer: slope | correlation | head: slope | correlation |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, curvature in variants.items():
        dd.correction.head.shared_curvature = curvature  # type: ignore[assignment]
        found[name] = compare(split, rows[: arguments.left_out].tolist())
        for step, figures in found[name].items():
            values = " | ".join(f"{value:.3f}" for value in figures.values())
            print(f"| {name} | {step} | {values} |", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
