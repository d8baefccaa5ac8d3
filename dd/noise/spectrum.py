"""The population spectrum behind a sample covariance.

Sample eigenvalues are spread wider than those of Σ, the more so the fewer samples there are a
dimension (Marchenko and Pastur 1967). Decoupled descent needs sums tr Σ f(Σ) of the population, f
decaying; the equation that binds the two spectra is solved here for the population's.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dd.noise.centred import CentredInputs
from dd.support.nonnegative import nonnegative_least_squares

__all__ = ["SampleSpectrum", "population_eigenvalues", "sample_eigenvalues"]

# Resolution of the equation and of the spectrum; both are smooth on this scale.
_RIDGES = 80
_ATOMS = 100
# Directions are iterated where there are this many times more, with some beside those sought.
_FEW, _BESIDE, _ITERATIONS = 4, 10, 4
# Share of the degrees of freedom up to which κ is known where rows are more than these.
_MOST_FREEDOM = 0.9


class SampleSpectrum:
    """Eigenvalues and directions of the sample covariance S = ZᵀZ / m.

    They come from the smaller of ZᵀZ and ZZᵀ: time n d min(n, d), memory min(n, d)².

    Args:
        centred: Z, the sample around its component means, shape (n, d).
        degrees: m, degrees of freedom, n less the number of components.
    """

    def __init__(self, centred: Tensor | CentredInputs, degrees: int) -> None:
        n, d = centred.shape
        self._centred, self._degrees = centred, degrees
        gram = torch.zeros(min(n, d), min(n, d), dtype=torch.float64, device=centred.device)
        for half in _halves(centred):
            gram.addmm_(half.mT, half, alpha=1 / degrees)
        self._gram = gram

    @cached_property
    def values(self) -> Tensor:
        """At most min(m, d), in squared input units, descending, positive, float64, on the CPU."""
        n, d = self._centred.shape
        values = torch.linalg.eigvalsh(self._gram).flip(0).cpu()[: min(self._degrees, d)]
        # Linearly dependent inputs leave eigenvalues that are rounding errors.
        precision = n**0.5 * torch.finfo(self._centred.dtype).eps
        return values[values > precision**2 * values[0]]

    def leading(self, count: int) -> Tensor:
        """Orthonormal directions of the largest eigenvalues, shape (d, count), float64.

        Few of them are found by iterations on a random subspace, which mix directions of
        eigenvalues that lie near each other (Halko, Martinsson and Tropp 2011).

        Args:
            count: at most as many as there are eigenvalues.
        """
        n, d = self._centred.shape
        gram, sought = self._gram, count + _BESIDE
        if _FEW * sought < len(gram):
            values, vectors = _leading(gram, sought)
        else:
            values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
        values, vectors = values[:count], vectors[:, :count]
        if n >= d:
            return vectors.contiguous()
        # From the directions among samples, the longer side of Z in parts.
        parts = [half @ vectors for half in _halves(self._centred)]
        return torch.cat(parts) / (self._degrees * values).sqrt()


def _leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Nearly the largest eigenvalues of a symmetric matrix, descending, and their directions."""
    # Of its own: nobody's random numbers are used up.
    source = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), count, generator=source, dtype=gram.dtype)
    basis = torch.linalg.qr(gram @ start.to(gram.device))[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis)[0]
    values, inside = torch.linalg.eigh(basis.mT @ gram @ basis)
    return values.flip(0), basis @ inside.flip(1)


def sample_eigenvalues(centred: Tensor | CentredInputs, degrees: int) -> Tensor:
    """Positive eigenvalues of the sample covariance, as :attr:`SampleSpectrum.values`.

    Args:
        centred: Z, the sample around its component means, shape (n, d).
        degrees: m, degrees of freedom, n less the number of components.
    """
    return SampleSpectrum(centred, degrees).values


def _halves(centred: Tensor | CentredInputs) -> Iterator[Tensor]:
    """Parts of Z along its longer side, that first, in double precision."""
    n, d = centred.shape
    if isinstance(centred, Tensor):
        yield (centred if n >= d else centred.mT).double()
    elif n >= d:
        yield from (block for _, block in centred.row_blocks())
    else:
        yield from (block.mT for block in centred.column_blocks())


def population_eigenvalues(sample: Tensor, dimension: int, degrees: int) -> Tensor:
    """Eigenvalues of Σ whose sample would have the eigenvalues given.

    A ridge s on the sample covariance leaves as many degrees of freedom as the ridge κ on Σ:

        Σ_i ℓ_i / (ℓ_i + s) = Σ_j λ_j / (λ_j + κ),      κ = s / (1 − (1/m) Σ_i ℓ_i / (ℓ_i + s)),

    which is the Marchenko-Pastur equation on the negative real axis (Silverstein and Bai 1995). The
    left side and κ are known at every s, the right side is linear in the density of λ; a
    non-negative density on a logarithmic grid is fitted by least squares, as El Karoui (2008)
    inverts the equation. Both sides fluctuate by O(1) in n and d, so by O(1/d) of their size.

    With fewer degrees of freedom than dimensions κ stays above a positive bound, and what lies
    below that bound is known by its trace alone.

    Args:
        sample: ℓ, positive, shape (r,), r ≤ min(m, d).
        dimension: d.
        degrees: m.

    Returns:
        λ, shape (d,), float64, descending, not negative, with the trace of the sample.
    """
    observed = sample.double().cpu().numpy()
    ridges, freedom = _effective_ridges(observed, degrees)
    atoms = np.geomspace(observed[0], min(observed[-1], 0.1 * ridges[-1]), _ATOMS)
    # κ carries an error of order 1/m over the factor below, which blows up at small ridges.
    weight = (1 - freedom / degrees) / freedom
    response = weight[:, None] * atoms / (atoms + ridges[:, None])
    # Directions without noise.
    atoms, response = np.append(atoms, 0.0), np.pad(response, ((0, 0), (0, 1)))
    # Trace and dimension are known without error: ten times the weight of any other equation.
    trace = observed.sum()
    matrix = np.vstack([response, 10 * atoms / trace, np.full(_ATOMS + 1, 10 / dimension)])
    target = np.concatenate([weight * freedom, [10.0, 10.0]])
    density = nonnegative_least_squares(matrix, target)
    return torch.from_numpy(_by_rank(density, atoms, dimension, trace))


def _effective_ridges(observed: np.ndarray, degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Return κ and the degrees of freedom that it leaves, over a grid of sample ridges."""
    sample_ridges = np.geomspace(20 * observed[0], 0.1 * observed[-1], _RIDGES)
    freedom = (observed / (observed + sample_ridges[:, None])).sum(1)
    if freedom.max() >= degrees:
        # Rows that share noise are more than their degrees of freedom.
        known = freedom < _MOST_FREEDOM * degrees
        sample_ridges, freedom = sample_ridges[known], freedom[known]
    return sample_ridges / (1 - freedom / degrees), freedom


def _by_rank(density: np.ndarray, atoms: np.ndarray, dimension: int, trace: float) -> np.ndarray:
    """Spread a density over ``dimension`` eigenvalues, each the mean over one unit of rank."""
    rank = np.concatenate([[0.0], np.cumsum(density)])
    mass = np.concatenate([[0.0], np.cumsum(density * atoms)])
    values = np.diff(np.interp(np.arange(dimension + 1), rank, mass))
    return values * (trace / values.sum())
