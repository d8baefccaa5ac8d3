"""Which estimate of the population spectrum serves decoupled descent best.

Decoupled descent uses a spectrum only through tr Σ f(Σ) with decaying f. Printed is the error of
tr Σ exp(−tΣ), relative, averaged over t from 0.01 to 10 times 1/mean λ as far as the trace has not
fallen below a hundredth: on simulated Gaussian samples of known covariance. Exits with 1 where the
estimator of ``dd.noise.spectrum`` is beaten, beyond the repetitions' spread, in one of the cells.

    python benchmarks/spectrum_estimators.py [--features shared/data/cifar10_efficientnet_lite0.npz]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dd.noise.spectrum import population_eigenvalues, sample_eigenvalues
from dd.support.nonnegative import nonnegative_least_squares

Estimator = Callable[[Tensor, int], Tensor]

DIMENSION, RATIOS, TRIALS = 400, (0.3, 1.0, 2.5, 10.0), 5
TIMES = torch.logspace(-2, 1, 30, dtype=torch.float64)


def raw(sample: Tensor, degrees: int) -> Tensor:
    """Sample eigenvalues as they are, (n, d) to (d,)."""
    found = sample_eigenvalues(sample, degrees)
    return torch.cat([found, found.new_zeros(sample.shape[1] - len(found))])


def shrunk(sample: Tensor, degrees: int) -> Tensor:
    """Linear shrinkage to the mean with the population's second moment."""
    values = raw(sample, degrees)
    mean, variance = values.mean(), values.var(correction=0)
    slope = (1 - len(values) / degrees * mean**2 / variance).clamp_min(0).sqrt()
    moved = (mean + slope * (values - mean)).clamp_min(0)
    return moved * mean / moved.mean()


def moments(sample: Tensor, degrees: int, highest: int = 7) -> Tensor:
    """Kong and Valiant (2017): unbiased moments, then a density on a logarithmic grid."""
    n, d = sample.shape
    gram = sample @ sample.mT
    upper = gram.triu(1)
    found, power = [float(gram.trace()) / (n * d)], torch.eye(n, dtype=gram.dtype)
    for order in range(2, highest + 1):
        power = power @ upper
        found.append(float((power * gram).sum()) / (math.comb(n, order) * d))
    known = np.array([m for m in found if m > 0])
    largest = float(sample_eigenvalues(sample, degrees)[0])
    atoms = np.geomspace(largest, 1e-5 * largest, 100)
    orders = np.arange(1, len(known) + 1)
    # The relative error of a moment grows with its order.
    weight = 1.0 / orders**2
    matrix = np.vstack([(atoms ** orders[:, None] / known[:, None]) * weight[:, None],
                        np.full(100, 10.0)])  # fmt: skip
    density = nonnegative_least_squares(matrix, np.append(weight, 10.0))
    rank = np.concatenate([[0.0], np.cumsum(density / density.sum())])
    mass = np.concatenate([[0.0], np.cumsum(density * atoms)])
    values = np.diff(np.interp(np.linspace(0, 1, d + 1), rank, mass))
    return torch.from_numpy(values * d * known[0] / values.sum())


def marchenko_pastur(sample: Tensor, degrees: int) -> Tensor:
    """The estimator of the package."""
    d = sample.shape[1]
    return population_eigenvalues(sample_eigenvalues(sample, degrees), d, degrees)


ESTIMATORS: dict[str, Estimator] = {
    "raw": raw,
    "shrunk": shrunk,
    "moments": moments,
    "marchenko-pastur": marchenko_pastur,
}


def spectra(features: Path | None) -> dict[str, Tensor]:
    """Known spectra of unit mean, by name, each of shape (DIMENSION,)."""
    d = DIMENSION
    flat = torch.ones(d, dtype=torch.float64)
    spikes, levels = flat.clone(), flat.clone()
    spikes[:8] = torch.logspace(math.log10(30), math.log10(3), 8, dtype=torch.float64)
    levels[d // 2 :] = 0.05
    found = {
        "flat": flat,
        "8 spikes": spikes,
        "two levels": levels,
        "1/rank": 1 / torch.arange(1, d + 1, dtype=torch.float64),
    }
    if features is not None:
        found["features"] = spectrum_of(features)
    return {name: values / values.mean() for name, values in found.items()}


def spectrum_of(path: Path) -> Tensor:
    """Spectrum of standardised features within classes, resampled to DIMENSION eigenvalues."""
    with np.load(path) as file:
        values = torch.from_numpy(file["train_features"]).double()
        labels = torch.from_numpy(file["train_labels"]).long()
    values = (values - values.mean(0)) / values.std(0, correction=0)
    for label in labels.unique():
        values[labels == label] -= values[labels == label].mean(0)
    degrees = len(values) - len(labels.unique())
    full = marchenko_pastur(values, degrees).numpy()
    at = (np.arange(DIMENSION) + 0.5) / DIMENSION
    return torch.from_numpy(np.interp(at, (np.arange(len(full)) + 0.5) / len(full), full))


def decayed_traces(eigenvalues: Tensor) -> Tensor:
    """Traces tr Σ exp(−tΣ) over TIMES."""
    return (eigenvalues * torch.exp(-TIMES[:, None] * eigenvalues)).sum(1)


def errors(eigenvalues: Tensor, ratio: float) -> dict[str, list[float]]:
    """Mean relative error of every estimator, one figure a repetition."""
    truth = decayed_traces(eigenvalues)
    counted = truth > 0.01 * eigenvalues.sum()
    n = int(ratio * DIMENSION)
    found: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for trial in range(TRIALS):
        generator = torch.Generator().manual_seed(trial)
        sample = torch.randn(n, DIMENSION, generator=generator, dtype=torch.float64)
        sample *= eigenvalues.sqrt()
        for name, estimate in ESTIMATORS.items():
            error = (decayed_traces(estimate(sample, n)) / truth - 1).abs()
            found[name].append(float(error[counted].mean()))
    return found


def main() -> int:
    """Print the table, write it, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, help="also the spectrum of these features")
    parser.add_argument("--json", type=Path, default=Path("spectrum_estimators.json"))
    arguments = parser.parse_args()
    rows, beaten = [], False
    print(f"| spectrum | n/d | {' | '.join(ESTIMATORS)} |\n|{'---|' * (2 + len(ESTIMATORS))}")
    for name, eigenvalues in spectra(arguments.features).items():
        for ratio in RATIOS:
            found = {k: np.array(v) for k, v in errors(eigenvalues, ratio).items()}
            mean = {k: float(v.mean()) for k, v in found.items()}
            print(f"| {name} | {ratio:g} | {' | '.join(f'{v:.4f}' for v in mean.values())} |")
            rows.append({"spectrum": name, "ratio": ratio, **mean})
            kept = found["marchenko-pastur"]
            beaten |= any(
                (kept - other).mean() > 3 * (kept - other).std() / math.sqrt(TRIALS - 1) + 0.005
                for other in found.values()
            )
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(beaten)


if __name__ == "__main__":
    sys.exit(main())
