"""The few eigenvalues that stand for a whole spectrum in decoupled descent.

The shadows use Σ only through tr Σ f(Σ), f a product of past decays. With one shadow an eigenvalue
λ_b of multiplicity ν_b that is Σ_b ν_b λ_b f(λ_b): a quadrature of the spectrum's density.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["leading_counts", "nodes"]

# The error of tr Σ exp(−tΣ) that is allowed: below what it takes to estimate the spectrum itself
# from ten samples a dimension or fewer, and at most that of twelve bins of equal log-rank.
TOLERANCE = 0.005
# Poles lie where decays have their effect: from this share of the mean eigenvalue to this of the
# largest.
_LEAST, _BELOW_LARGEST = 0.5, 0.25
# Times of a decay in units of 1/mean λ, and the share of the trace below which it has ended.
_TIMES, _ENDED = np.geomspace(0.01, 10, 30), 0.01


def nodes(spectrum: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and multiplicities whose decayed traces are those of a spectrum.

    The fewest for which tr Σ exp(−tΣ) is right to a relative 0.005, in the mean over t from 0.01 to
    10 times 1/mean λ as far as it has not fallen below a hundredth of tr Σ. Dimension and trace are
    those of the spectrum, exactly, and nodes lie between its ends.

    Args:
        spectrum: λ, shape (d,), not negative and not all zero.
        most: number of nodes, at most.

    Returns:
        λ_b, descending, and ν_b, positive and not whole numbers in general; each of shape (B,),
        float64.
    """
    spectrum = spectrum.double().cpu()
    scale = spectrum.mean()
    values = (spectrum / scale).numpy()
    for count in range(1, most + 1):
        found, weights = _rational_gauss(values, _poles(values, count - 1))
        if _error(values, found, weights) <= TOLERANCE or len(found) < count:
            break
    return scale * torch.from_numpy(found), torch.from_numpy(weights)


def leading_counts(multiplicities: Tensor, most: int) -> list[int]:
    """Dimensions up to and with each of the leading bins, but the last one of all.

    Args:
        multiplicities: ν, shape (B,), of bins in descending order of eigenvalues.
        most: dimensions at most.
    """
    bounds = multiplicities.double().cumsum(0).round().long().tolist()
    return [bound for bound in bounds[:-1] if 0 < bound <= most]


def _poles(values: np.ndarray, count: int) -> np.ndarray:
    """Poles for values of mean 1."""
    low, high = _LEAST, max(_LEAST, _BELOW_LARGEST * values.max())
    return np.geomspace(low, high, count) if count > 1 else np.full(count, np.sqrt(low * high))


def _rational_gauss(values: np.ndarray, poles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes λ_b and weights ν_b, exact for 1, λ, 1/(λ + c) and 1/(λ + c)² at every pole c.

    These span the polynomials of degree 2m − 1 over Π(λ + c)², m − 1 poles. So it is Gauss's rule
    of m nodes for the density over Π(λ + c)² (Gautschi, Numer. Math. 1993), from the three-term
    recurrence of its orthogonal polynomials (Golub and Welsch, Math. Comp. 1969).
    """
    logs = 2 * np.log(values[:, None] + poles).sum(1)
    density = np.exp(logs.min() - logs)
    basis = [np.sqrt(density / density.sum())]
    diagonal, beside = [], []
    for _ in range(len(poles) + 1):
        image = values * basis[-1]
        diagonal.append(image @ basis[-1])
        # Twice, so that rounding leaves them orthogonal.
        for vector in basis * 2:
            image = image - (image @ vector) * vector
        size = np.linalg.norm(image)
        # Fewer distinct eigenvalues than nodes are their own quadrature.
        if size <= 1e-9 * values.max():
            break
        beside.append(size)
        basis.append(image / size)
    beside = beside[: len(diagonal) - 1]
    found, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    found = found.clip(values.min(), values.max())
    shares = vectors[0] ** 2 * density.sum()
    weights = shares * np.exp(2 * np.log(found[:, None] + poles).sum(1) - logs.min())
    return found[::-1].copy(), weights[::-1].copy()


def _error(values: np.ndarray, found: np.ndarray, weights: np.ndarray) -> float:
    """Mean relative error of the decayed traces, for values of mean 1."""
    truth, traces = (
        (mass * np.exp(-_TIMES[:, None] * at)).sum(1)
        for at, mass in ((values, values), (found, weights * found))
    )
    counted = truth > _ENDED * values.sum()
    return float(np.abs(traces[counted] / truth[counted] - 1).mean()) if counted.any() else 0.0
