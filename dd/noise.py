"""The noise that a sample carries around the mean of its mixture component."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dd.checks import check_count
from dd.functional import centre_within_components
from dd.spectrum import population_eigenvalues, sample_eigenvalues

__all__ = ["NoiseModel"]


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """Covariance of the inputs within mixture components, reduced to eigenvalue bins.

    An input is x_i = μ_{a(i)} + z_i with z_i ~ N(0, Σ); this holds what decoupled descent has to
    know of Σ and of the components a(i).

    Attributes:
        eigenvalues: λ, noise variance per coordinate of each bin, in squared input units,
            shape (B,).
        multiplicities: ν, dimension of each bin, shape (B,); with m they sum to the input
            dimension d.
        components: component of each sample in the order of the training batch, shape (n,),
            integers from 0; None when the components are unknown.
        relative_mass: ‖z_i‖² over its mean, in the order of the training batch, shape (n,); None
            where every sample carries the same.
        mean_directions: orthonormal basis of the span of the component means, shape (d, m), where
            the bins describe the noise in its complement alone; None where they describe all of it.

    Raises:
        ValueError: if a shape or value cannot describe a covariance.
    """

    eigenvalues: Tensor
    multiplicities: Tensor
    components: Tensor | None = None
    relative_mass: Tensor | None = None
    mean_directions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.eigenvalues.dim() != 1 or self.eigenvalues.shape != self.multiplicities.shape:
            raise ValueError(
                "NoiseModel: expected eigenvalues and multiplicities of one shape (bins,), got "
                f"{tuple(self.eigenvalues.shape)} and {tuple(self.multiplicities.shape)}"
            )
        if not bool(torch.isfinite(self.eigenvalues).all() and (self.eigenvalues >= 0).all()):
            raise ValueError(
                f"NoiseModel: eigenvalues must be finite and not negative, got {self.eigenvalues}; "
                "clip rounding errors at 0"
            )
        if not bool((self.multiplicities > 0).all()):
            raise ValueError(
                f"NoiseModel: multiplicities must be positive, got {self.multiplicities}"
            )
        if self.components is not None:
            _as_components(self.components, len(self.components))
        if self.relative_mass is not None:
            _check_relative_mass(self.relative_mass, self.components)

    @classmethod
    def isotropic(
        cls, inputs: Tensor | np.ndarray, components: Tensor | np.ndarray | None = None
    ) -> "NoiseModel":
        """Estimate Σ = λI, with λ = tr Σ / d from the inputs around their component means.

        Args:
            inputs: training inputs, shape (n, d).
            components: integer mixture component (or class, where each class is one component) of
                each sample, shape (n,). Without them one common mean is subtracted, and λ contains
                the spread of the component means.

        Returns:
            A model with one bin.

        Raises:
            ValueError: if the inputs are not a finite (n, d) matrix that varies within components,
                or the components are not n integers.
        """
        noise = _noise_of(inputs, components)
        variance = noise.centred.square().sum(dtype=torch.float64) / noise.degrees
        d = noise.centred.shape[1]
        return cls(
            eigenvalues=(variance / d).to(noise.centred.dtype).reshape(1),
            multiplicities=torch.tensor([d], device=noise.centred.device),
            components=noise.components,
        )

    @classmethod
    def fit(
        cls,
        inputs: Tensor | np.ndarray,
        components: Tensor | np.ndarray | None = None,
        bins: int = 12,
        *,
        per_sample: bool | None = None,
        separate_means: bool = False,
    ) -> "NoiseModel":
        """Estimate the population spectrum of Σ, in bins spaced geometrically in rank.

        Section 4 of ``docs/theory.md``; the spectrum is that of
        :func:`dd.spectrum.population_eigenvalues`. Takes time n d min(n, d), and memory min(n, d)²
        in float64 beside a few copies of the inputs.

        Args:
            inputs: training inputs, shape (n, d), on any device.
            components: as in :meth:`isotropic`.
            bins: largest number of bins; rounding of ranks to integers can leave fewer. One bin is
                the isotropic model.
            per_sample: whether a sample's noise mass is scaled by ‖z_i‖² over its mean, which needs
                Stein's curvature; by default where the components are known and these norms vary
                far more than those of Gaussian noise would.
            separate_means: whether the directions of the component means are kept out of the bins
                and followed exactly, which ``DecoupledDescent(head=True)`` needs where the
                components are known.

        Returns:
            A model with eigenvalues in descending order.

        Raises:
            ValueError: as :meth:`isotropic`, if ``bins`` is not a positive integer, or if the means
                of unknown components, or of as many as there are dimensions, are to be separated.
        """
        check_count("NoiseModel: bins", bins)
        if bins == 1 and per_sample is False and not separate_means:
            return cls.isotropic(inputs, components)
        noise = _noise_of(inputs, components, separate_means=separate_means)
        spectrum = noise.spectrum()
        edges = _edges(len(spectrum), bins)
        values = torch.stack([part.mean() for part in spectrum.split(edges.diff().tolist())])
        relative = noise.relative_mass()
        if per_sample is None:
            per_sample = noise.components is not None and _is_heavy_tailed(relative, spectrum)
        return cls(
            eigenvalues=values.to(noise.centred),
            multiplicities=edges.diff().to(noise.centred.device),
            components=noise.components,
            relative_mass=relative if per_sample else None,
            mean_directions=noise.mean_directions,
        )

    @property
    def dimension(self) -> int:
        """Input dimension d."""
        separated = 0 if self.mean_directions is None else self.mean_directions.shape[1]
        return int(self.multiplicities.sum()) + separated

    @property
    def num_samples(self) -> int | None:
        """Number of samples n that the model knows one by one, or None."""
        known = self.components if self.relative_mass is None else self.relative_mass
        return None if known is None else len(known)

    @property
    def mass(self) -> Tensor:
        """Noise mass τ_b = ν_b λ_b = E‖z‖² of each bin, shape (B,)."""
        return self.multiplicities * self.eigenvalues

    def to(self, device: torch.device, dtype: torch.dtype) -> "NoiseModel":
        """Return a copy with eigenvalues in ``dtype`` and every tensor on ``device``."""
        return NoiseModel(
            eigenvalues=self.eigenvalues.to(device, dtype),
            multiplicities=self.multiplicities.to(device),
            components=None if self.components is None else self.components.to(device),
            relative_mass=(
                None if self.relative_mass is None else self.relative_mass.to(device, dtype)
            ),
            mean_directions=(
                None if self.mean_directions is None else self.mean_directions.to(device, dtype)
            ),
        )


@dataclass(frozen=True, eq=False)
class _Noise:
    """Inputs around their component means (n, d), the ids (n,) and the degrees of freedom.

    Where the means are separated, what lies along their directions (d, m) is taken out.
    """

    centred: Tensor
    components: Tensor | None
    degrees: int
    mean_directions: Tensor | None = None

    def spectrum(self) -> Tensor:
        """Population eigenvalues, shape (d,), float64, on the CPU."""
        found = sample_eigenvalues(self.centred, self.degrees)
        separated = 0 if self.mean_directions is None else self.mean_directions.shape[1]
        return population_eigenvalues(found, self.centred.shape[1] - separated, self.degrees)

    def relative_mass(self) -> Tensor:
        """‖z_i‖² over its mean, shape (n,); 1 for the only sample of a component."""
        mass = self.centred.square().sum(1)
        if self.components is None:
            return mass / mass.mean()
        if self.mean_directions is not None:
            # What the mean of n_a samples takes of each one's noise lies along its direction, and
            # is followed there.
            return mass / mass.mean() * (self.degrees / len(mass))
        # The mean of n_a samples takes 1/n_a of each one's noise with it.
        sizes = torch.bincount(self.components)[self.components]
        alone = sizes == 1
        mass = mass / (1 - 1 / sizes.clamp_min(2).to(mass))
        return torch.where(alone, 1.0, mass / mass[~alone].mean())


def _noise_of(
    inputs: Tensor | np.ndarray,
    components: Tensor | np.ndarray | None,
    *,
    separate_means: bool = False,
) -> _Noise:
    values = _as_matrix(inputs)
    n = len(values)
    ids = None if components is None else _as_components(components, n).to(values.device)
    labels = torch.zeros(n, dtype=torch.long, device=values.device) if ids is None else ids
    num_components = int(labels.max()) + 1
    if n <= num_components:
        raise ValueError(
            f"NoiseModel: {n} samples in {num_components} components leave no noise to "
            "measure; give more samples or fewer components"
        )
    centred = centre_within_components(values, labels, num_components)
    # Once more, because the mean of inputs far from zero is rounded like numbers of their size.
    centred = centre_within_components(centred, labels, num_components)
    rounding = torch.finfo(values.dtype).eps
    power = centred.square().sum(dtype=torch.float64) / ((n - num_components) * values.shape[1])
    if not float(power) > rounding**2 * float(values.square().mean()):
        raise ValueError(
            "NoiseModel: the inputs do not vary within their components; decoupled descent "
            "needs noisy inputs"
        )
    if not separate_means:
        return _Noise(centred, ids, n - num_components)
    if ids is None:
        raise ValueError("NoiseModel: separate_means needs the component of every sample")
    directions = _mean_directions(values - centred, ids, num_components)
    centred = centred - (centred @ directions) @ directions.mT
    return _Noise(centred, ids, n - num_components, directions)


def _mean_directions(means: Tensor, ids: Tensor, num_components: int) -> Tensor:
    """Orthonormal basis of the span of the component means, given as one row a sample.

    Raises:
        ValueError: if they span all dimensions.
    """
    first = torch.stack([(ids == a).nonzero()[0, 0] for a in range(num_components)])
    _, sizes, directions = torch.linalg.svd(means[first], full_matrices=False)
    spanned = sizes > 1e-4 * sizes[0]
    if int(spanned.sum()) >= means.shape[1]:
        raise ValueError(
            f"NoiseModel: the means of {num_components} components span all {means.shape[1]} input "
            "dimensions and leave no noise beside them; use separate_means=False"
        )
    return directions[spanned].mT.contiguous()


def _edges(dimension: int, bins: int) -> Tensor:
    """Ranks at which bins begin and end, from 0 to d, spaced geometrically from 1 on."""
    if bins == 1:
        return torch.tensor([0, dimension])
    ranks = torch.logspace(0, math.log10(dimension), bins, dtype=torch.float64).round().long()
    return torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), ranks]))


def _is_heavy_tailed(relative_mass: Tensor, spectrum: Tensor) -> bool:
    # Gaussian norms have variance 2 tr Σ² / (tr Σ)²; features of one scale a sample have several
    # times that.
    gaussian = 2 * spectrum.square().sum() / spectrum.sum().square()
    return float(relative_mass.double().var()) > 3 * float(gaussian)


def _check_relative_mass(relative_mass: Tensor, components: Tensor | None) -> None:
    if relative_mass.dim() != 1 or (
        components is not None and len(components) != len(relative_mass)
    ):
        raise ValueError(
            "NoiseModel: expected one relative mass a sample, shape (n,), got "
            f"{tuple(relative_mass.shape)}"
            + ("" if components is None else f" for {len(components)} component ids")
        )
    if not bool((torch.isfinite(relative_mass) & (relative_mass >= 0)).all()):
        raise ValueError("NoiseModel: relative masses must be finite and not negative")


def _as_matrix(inputs: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(inputs).detach()
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(
            f"NoiseModel: expected inputs of shape (n, d), got {tuple(values.shape)}; "
            "flatten each sample to one row"
        )
    if values.dtype not in {torch.float32, torch.float64}:
        values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("NoiseModel: the inputs contain NaN or infinity; clean them first")
    return values


def _as_components(components: Tensor | np.ndarray, n: int) -> Tensor:
    ids = torch.as_tensor(components).detach()
    if ids.shape != (n,) or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"NoiseModel: expected {n} integer component ids, one a sample, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    return torch.unique(ids, return_inverse=True)[1]
