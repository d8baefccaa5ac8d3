"""How few eigenvalues stand for a spectrum: ``dd.noise.quadrature`` beside bins by geometric rank.

Printed is the mean relative error of tr Σ exp(−tΣ), t from 0.01 to 10 times 1/mean λ as far as the
trace has not fallen below a hundredth. Features, found through DD_DATA, are those of a thousand
images, as ``NoiseModel.fit`` sees them. The exit code is 1 where six nodes are worse than twelve
bins.

    python benchmarks/spectrum_nodes.py
"""

import os
import sys

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from dd.noise.quadrature import _error, _poles, _rational_gauss
from dd.noise.spectrum import population_eigenvalues, sample_eigenvalues

BINS, NODES = 12, (2, 3, 4, 5, 6)


def by_rank(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and sizes of bins of eigenvalues in descending order."""
    ranks = np.geomspace(1, len(spectrum), BINS).round().astype(int)
    parts = np.split(spectrum, np.unique(ranks)[:-1])
    return np.array([part.mean() for part in parts]), np.array([float(len(p)) for p in parts])


def spectra() -> dict[str, np.ndarray]:
    """Eigenvalues in descending order."""
    ranks = np.arange(1.0, 1025)
    found = {
        "1/j, d = 1024": 1 / ranks,
        "1/√j, d = 1024": 1 / np.sqrt(ranks),
        "two decades evenly in log λ, d = 1024": np.geomspace(10, 0.1, 1024),
    }
    if "DD_DATA" in os.environ:
        found["features of CIFAR-10, fitted to n = 1000"] = _features()
    return found


def _features() -> np.ndarray:
    with np.load(f"{os.environ['DD_DATA']}/cifar10_efficientnet_lite0.npz") as data:
        inputs = torch.from_numpy(data["train_features"][:1000]).double()
        labels = torch.from_numpy(data["train_labels"][:1000]).long()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    for label in labels.unique():
        inputs[labels == label] -= inputs[labels == label].mean(0)
    degrees = len(inputs) - len(labels.unique())
    sample = sample_eigenvalues(inputs, degrees)
    return population_eigenvalues(sample, inputs.shape[1], degrees).numpy()


def main() -> int:
    """Print the table."""
    table, worse = Table("spectrum", f"{BINS} bins by rank", box=MARKDOWN), False
    for count in NODES:
        table.add_column(f"{count} nodes", justify="right")
    for name, spectrum in spectra().items():
        values = spectrum / spectrum.mean()
        binned = _error(values, *by_rank(values))
        errors = [
            _error(values, *_rational_gauss(values, _poles(values, count - 1))) for count in NODES
        ]
        table.add_row(name, f"{binned:.4f}", *(f"{error:.4f}" for error in errors))
        worse |= errors[-1] > binned
    Console(width=120).print(table)
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
