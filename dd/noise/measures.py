"""What is measured of training inputs: spectra, masses, tails and the span of means."""

import numpy as np
import torch
from torch import Tensor

from dd.noise.arguments import _as_components, _as_matrix
from dd.noise.centred import CentredInputs
from dd.noise.spectrum import SampleSpectrum

# Largest side of the matrix whose eigenvalues are the spectrum: 3.2 GB in double precision.
LARGEST_GRAM = 20_000


# A relative variance of the eigenvalues below this moves the correction by less than a hundredth.
FLAT = 0.02


# Beyond these a head of a few hundred units is small for the samples.
MOST_PER_COMPONENT = 10_000


# Variance of ‖z‖² over that of Gaussian noise of the same spectrum.
HEAVY_TAILED = 3


def _one_bin(centred: CentredInputs, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalue and multiplicity of the isotropic model, each of shape (1,)."""
    variance = norms.sum() / (centred.degrees * centred.dimension)
    return variance.reshape(1), torch.tensor([centred.dimension])


def _sample_spectrum(centred: CentredInputs) -> SampleSpectrum:
    """Spectrum of the sample covariance.

    Raises:
        ValueError: if min(n, d) is too large for memory.
    """
    smaller = min(centred.shape)
    if smaller > LARGEST_GRAM:
        raise ValueError(
            f"NoiseModel: the spectrum of {centred.shape} inputs takes a "
            f"{smaller} × {smaller} matrix, {8e-9 * smaller**2:.0f} GB; use "
            f"NoiseModel.isotropic, or fit on a sample of at most {LARGEST_GRAM} rows and give "
            "the model every sample's component, dataclasses.replace(model, components=...)"
        )
    return SampleSpectrum(centred, centred.degrees)


def _relative_mass(centred: CentredInputs, norms: Tensor) -> Tensor:
    """‖z_i‖² over its mean, shape (n,); 1 for the only sample of a component."""
    mass = norms.to(centred.dtype)
    if centred.components is None:
        return mass / mass.mean()
    if centred.directions is not None:
        # What the mean of n_a samples takes of each one's noise lies along its direction, and
        # is followed there.
        return mass / mass.mean() * (centred.degrees / len(mass))
    # The mean of n_a samples takes 1/n_a of each one's noise with it.
    sizes = centred.sizes[centred.components]
    alone = sizes == 1
    mass = mass / (1 - 1 / sizes.clamp_min(2).to(mass))
    return torch.where(alone, 1.0, mass / mass[~alone].mean())


def _centred(
    inputs: Tensor | np.ndarray,
    components: Tensor | np.ndarray | None,
    *,
    separate_means: bool = False,
) -> tuple[CentredInputs, Tensor]:
    """Inputs around their component means, and ‖z_i‖² (n,).

    Raises:
        ValueError: as :meth:`NoiseModel.fit`.
    """
    values = _as_matrix(inputs)
    n = len(values)
    ids = None if components is None else _as_components(components, n)
    num_components = 1 if ids is None else int(ids.max()) + 1
    if n <= num_components:
        raise ValueError(
            f"NoiseModel: {n} samples in {num_components} components leave no noise to "
            "measure; give more samples or fewer components"
        )
    if separate_means and ids is None:
        raise ValueError("NoiseModel: separate_means needs the component of every sample")
    centred = CentredInputs(values, ids)
    _check_range(centred)
    norms = centred.squared_norms()
    rounding = torch.finfo(centred.dtype).eps
    variance = float(norms.sum()) / (centred.degrees * values.shape[1])
    if not variance > rounding**2 * centred.power:
        raise ValueError(
            "NoiseModel: the inputs do not vary within their components by more than the rounding "
            f"of {str(centred.dtype).removeprefix('torch.')}; decoupled descent needs noisy "
            "inputs. Where their mean is far larger than their noise, subtract it in float64 first"
        )
    if separate_means:
        centred.separate(_span(centred.means))
        norms = centred.squared_norms()
    return centred, norms


def _check_range(centred: CentredInputs) -> None:
    """Refuse inputs whose squares, summed over all samples, are beyond their precision.

    Raises:
        ValueError: if they are.
    """
    kind, double, size = torch.finfo(centred.dtype), torch.finfo(torch.float64), centred.largest
    # Eigenvalues are squares in the inputs' precision; squares of these are formed in double.
    lowest = max((kind.tiny / kind.eps) ** 0.5, (double.tiny / double.eps) ** 0.25)
    highest = min((kind.max * kind.eps) ** 0.5, (double.max * double.eps) ** 0.25)
    if size > 0 and not lowest < size < highest:
        name = str(centred.dtype).removeprefix("torch.")
        raise ValueError(
            f"NoiseModel: inputs as large as {size:.1e} have squares beyond the range of {name}; "
            "divide them by one number, such as their standard deviation, so that the largest is "
            f"between {lowest:.0e} and {highest:.0e}"
        )


def _may_separate(centred: CentredInputs) -> bool:
    """Whether a head that over-fits is to be expected, and means and noise can be told apart."""
    few = len(centred.source) <= MOST_PER_COMPONENT * len(centred.sizes)
    return centred.components is not None and few and centred.dimension > 1


def _span(means: Tensor, most: int | None = None) -> Tensor:
    """Orthonormal basis of the span of the component means, given as rows.

    Args:
        means: shape (C, d).
        most: dimensions at most, those in which the means lie furthest apart.

    Raises:
        ValueError: if they span all dimensions.
    """
    # The common mean can be far larger than what tells the components apart.
    common = means.mean(0, keepdim=True)
    apart = means - common
    size = apart.norm() if bool(apart.any()) else common.norm()
    rows = torch.cat([apart, common * (size / common.norm().clamp_min(1e-30))])
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    spanned = sizes > 1e-4 * sizes[0]
    if most is not None:
        return directions[spanned][:most].mT.contiguous()
    if int(spanned.sum()) >= means.shape[1]:
        raise ValueError(
            f"NoiseModel: the means of {len(means)} components span all {means.shape[1]} input "
            "dimensions and leave no noise beside them; use separate_means=False"
        )
    return directions[spanned].mT.contiguous()


def _is_flat(sample: Tensor, dimension: int, degrees: int) -> bool:
    # The relative variance of the eigenvalues, which sampling a flat spectrum raises by (d + 1)/m
    # with deviation 2/m (Ledoit and Wolf 2002).
    mean = sample.sum() / dimension
    spread = float(sample.square().sum() / (dimension * mean.square())) - 1
    return spread - (dimension + 1) / degrees < max(FLAT, 6 / degrees)


def _effective_rank(eigenvalues: Tensor, multiplicities: Tensor | float = 1.0) -> float:
    mass = multiplicities * eigenvalues.double()
    second = (mass * eigenvalues.double()).sum()
    return float(mass.sum().square() / second.clamp_min(1e-300))


def _is_heavy_tailed(variance: float, rank: float) -> bool:
    # Gaussian norms have relative variance 2 tr Σ² / (tr Σ)²; features of one scale a sample have
    # several times that.
    return variance > HEAVY_TAILED * 2 / max(rank, 1e-300)
