"""The noise that a sample carries around the mean of its mixture component."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dd.noise.arguments import _as_components, _check_bins, _check_relative_mass
from dd.noise.measures import (
    _centred,
    _effective_rank,
    _is_heavy_tailed,
    _may_separate,
    _span,
)
from dd.noise.parts import measured, measured_units, refuse_for_units
from dd.noise.unit_fit import unit_inputs
from dd.noise.units import Units
from dd.noise.words import described
from dd.support.checks import check_count

__all__ = ["NoiseModel"]


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """Covariance of the inputs within mixture components, reduced to eigenvalue bins.

    An input is x_i = μ_{a(i)} + z_i with z_i ~ N(0, Σ); this holds what decoupled descent has to
    know of Σ and of the components a(i).

    Attributes:
        eigenvalues: λ, noise variance per coordinate of each bin, in squared input units,
            shape (B,).
        multiplicities: ν, dimension of each bin, shape (B,), not whole numbers in general; with m
            they sum to the input dimension d. Positive, or 0 where nothing is left for the bins.
        components: component of each sample in the order of the training batch, shape (n,),
            integers from 0; None when the components are unknown.
        relative_mass: ‖z_i‖² over its mean, in the order of the training batch, shape (n,); None
            where every sample carries the same.
        mean_directions: orthonormal basis, shape (d, m), of what is followed exactly: the span of
            the component means, where the bins describe the noise in its complement alone, or all
            of the inputs' space, where they describe nothing. None where they describe all.
        fitted_on: number of samples that the model was fitted on, or None.
        norm_variation: standard deviation of ‖z_i‖² over its mean, or None where not measured.
        fingerprints: of the samples fitted on, shape (n, 3), to know batches of them by; or None.
        copies: how many of them are copies of others, or nearly so; None where not looked for.
        leading_directions: orthonormal, of the leading bins up to an eighth of all dimensions, in
            the order of the bins, shape (d, r); None where there are none, or not measured.
        separated: the same noise with the directions of the component means kept out of the bins,
            for an optimizer that follows these exactly (``head=``); or None.
        units: which rows share noise, where several are one unit: ``components`` are then those of
            the samples, and masses those of the units' Gram matrices. None where a sample is a row.
        separated_from: what ``separated`` goes with: a model whose noise was replaced afterwards
            has no other form.

    Raises:
        ValueError: if a shape or value cannot describe a covariance.

    Example:
        >>> noise = dd.NoiseModel.fit(X, y)
        >>> print(noise)
        noise model: 1 bin, effective rank 50 of 50, n/d 10, norm variation 0.2..., 2 components
        >>> bool((noise.eigenvalues - 1).abs() < 0.05)  # the noise has covariance I
        True
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise)
    """

    eigenvalues: Tensor
    multiplicities: Tensor
    components: Tensor | None = None
    relative_mass: Tensor | None = None
    mean_directions: Tensor | None = None
    fitted_on: int | None = None
    norm_variation: float | None = None
    fingerprints: Tensor | None = None
    copies: int | None = None
    units: Units | None = None
    leading_directions: Tensor | None = None
    separated: "NoiseModel | None" = None
    separated_from: tuple[Tensor | None, ...] | None = None

    def __post_init__(self) -> None:
        _check_bins(self.eigenvalues, self.multiplicities)
        # Nothing is left for the bins where every direction is followed by itself.
        none = (self.multiplicities == 0) & (not self.is_followed_exactly)
        if bool((none | ~(self.multiplicities >= 0)).any()):
            raise ValueError(
                f"NoiseModel: multiplicities must be positive, got {self.multiplicities}"
            )
        if self.components is not None:
            _as_components(self.components, len(self.components))
        if self.relative_mass is not None:
            _check_relative_mass(self.relative_mass, self.components)
        directions = self.mean_directions
        in_bins = float(self.multiplicities.sum())
        if directions is not None and (
            directions.dim() != 2 or len(directions) != directions.shape[1] + round(in_bins)
        ):
            raise ValueError(
                f"NoiseModel: expected mean_directions of shape (d, m), d = m + {in_bins:g} "
                f"dimensions in bins; got {tuple(directions.shape)}"
            )
        leading = self.leading_directions
        if leading is not None and (leading.dim() != 2 or len(leading) != self.dimension):
            raise ValueError(
                f"NoiseModel: expected leading_directions of shape ({self.dimension}, r), got "
                f"{tuple(leading.shape)}"
            )

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

        Example:
            >>> noise = dd.NoiseModel.isotropic(X, y)
            >>> noise.eigenvalues.shape, noise.multiplicities.tolist()
            (torch.Size([1]), [50.0])
        """
        centred, norms = _centred(inputs, components)
        return cls(**measured(centred, norms, bins=1, per_sample=False))

    @classmethod
    def fit(
        cls,
        inputs: Tensor | np.ndarray,
        components: Tensor | np.ndarray | None = None,
        bins: int | None = None,
        *,
        groups: Tensor | np.ndarray | None = None,
        per_sample: bool | None = None,
        separate_means: bool | None = None,
    ) -> "NoiseModel":
        """Estimate the population spectrum of Σ, and stand a few eigenvalues for all.

        Section 4 of ``docs/theory.md``; the spectrum is that of
        :func:`dd.noise.spectrum.population_eigenvalues`, the few are those of
        :func:`dd.noise.quadrature.nodes`. Takes time n d min(n, d), and memory min(n, d)² in
        float64. The inputs are read in blocks and not copied, so that they may be a
        ``numpy.memmap`` larger than memory.

        Args:
            inputs: training inputs, shape (n, d), on any device or in a mapped file; or (n, …, d)
                for samples of several rows each, which are left out together (patches, tokens,
                views). Their rows are told apart by position; rows of zeros are padding.
            components: as in :meth:`isotropic`, one a sample.
            bins: largest number of bins; fewer are taken where fewer serve as well, to half a per
                cent of what the correction makes of the spectrum. One bin is the isotropic model.
                By default one where the spectrum is flat up to what n samples resolve or the
                correction feels (a relative variance of the eigenvalues below 0.02 or 6/n), else
                12 at most.
            groups: which rows of inputs (n, d) are left out together, such as all of one patient:
                an integer for each row, shape (n,).
            per_sample: whether a sample's noise mass is scaled by ‖z_i‖² over its mean; by default
                where the components are known and these norms vary far more than those of Gaussian
                noise would.
            separate_means: whether the directions of the component means are kept out of the bins
                and followed exactly, as ``DecoupledDescent(head=True)`` does where the components
                are known. By default the model has both forms, where components are known and the
                samples so few that a head may need correction (10 000 a component).

        Returns:
            A model with eigenvalues in descending order.

        Raises:
            ValueError: as :meth:`isotropic`; if ``bins`` is not a positive integer; if min(n, d) is
                beyond 20 000, where the matrix behind the spectrum would take gigabytes; or if the
                means of unknown components, or of as many as there are dimensions, are to be
                separated.

        Example:
            >>> X[:, 25:] *= 2  # half of the inputs vary more
            >>> noise = dd.NoiseModel.fit(X, y, bins=2)
            >>> noise.eigenvalues.round()
            tensor([4., 1.])
            >>> patients = torch.arange(500) // 5  # five rows of each
            >>> print(dd.NoiseModel.fit(X, y, groups=patients).units)
            100 units of 5 rows that correlate by ...
            >>> print(dd.NoiseModel.fit(X.view(100, 5, 50)).units)  # five rows a sample
            100 units of 5 rows that correlate by ...
        """
        if bins is not None:
            check_count("NoiseModel: bins", bins)
        units = unit_inputs(inputs, components, groups)
        if units is not None:
            refuse_for_units(per_sample, separate_means)
            centred, norms = _centred(units.values, units.components)
            model = cls(**measured_units(units, centred, norms, bins))
            if units.are_samples or not _may_separate(centred):
                return model
            centred.separate(_span(centred.means, centred.dimension - 1))
            apart = measured_units(units, centred, centred.squared_norms(), bins)
            return model._with(cls(**apart))
        centred, norms = _centred(inputs, components, separate_means=separate_means is True)
        model = cls(**measured(centred, norms, bins, per_sample=per_sample))
        if separate_means is not None or not _may_separate(centred):
            return model
        centred.separate(_span(centred.means, centred.dimension - 1))
        apart = measured(centred, centred.squared_norms(), bins, per_sample=per_sample)
        return model._with(cls(**apart))

    @property
    def is_in_both_forms(self) -> bool:
        """Whether the component means are known apart from this very noise."""
        if self.separated is None or self.separated_from is None:
            return False
        pairs = zip(self._measured, self.separated_from, strict=True)
        return all(mine is its for mine, its in pairs)

    def with_means_apart(self) -> "NoiseModel":
        """The same noise and samples, with the directions of the component means kept out.

        Raises:
            ValueError: if this model was not fitted in both forms.

        Example:
            >>> noise = dd.NoiseModel.fit(X, y).with_means_apart()
            >>> noise.mean_directions.shape, noise.dimension
            (torch.Size([50, 2]), 50)
        """
        if self.separated is None or not self.is_in_both_forms:
            raise ValueError(
                "NoiseModel: the component means are not known apart from the noise; fit with "
                "NoiseModel.fit(inputs, components) and separate_means as it is"
            )
        return replace(
            self.separated,
            components=self.components,
            fingerprints=self.fingerprints,
            copies=self.copies,
        )

    def with_every_direction_apart(self) -> "NoiseModel":
        """The same samples in a space whose every direction is followed exactly: no noise is left.

        What follows the directions knows each sample's own place there, so that nothing is assumed
        of the noise.

        Example:
            >>> noise = dd.NoiseModel.fit(X, y).with_every_direction_apart()
            >>> noise.is_followed_exactly, float(noise.mass.sum())
            (True, 0.0)
        """
        like = self.eigenvalues
        return replace(
            self,
            eigenvalues=like.new_zeros(1),
            multiplicities=like.new_zeros(1),
            mean_directions=torch.eye(self.dimension, dtype=like.dtype, device=like.device),
            relative_mass=None,
            leading_directions=None,
            separated=None,
            separated_from=None,
        )

    def spread_over_means(self) -> "NoiseModel":
        """The same bins over all dimensions, those of the component means included.

        Raises:
            ValueError: if there is nothing in the bins.

        Example:
            >>> noise = dd.NoiseModel.fit(X, y, separate_means=True)
            >>> round(float(noise.multiplicities.sum()))
            48
            >>> round(float(noise.spread_over_means().multiplicities.sum()))
            50
        """
        if self.is_followed_exactly:
            raise ValueError(
                "NoiseModel: every direction is followed by itself, and nothing is known of the "
                "noise; fit another with NoiseModel.fit(inputs, components)"
            )
        share = self.dimension / float(self.multiplicities.sum())
        return replace(self, multiplicities=share * self.multiplicities, mean_directions=None)

    def in_one_bin(self) -> "NoiseModel":
        """The same noise as if it were isotropic.

        Example:
            >>> noise = dd.NoiseModel(torch.tensor([4.0, 1.0]), torch.tensor([10.0, 30.0]))
            >>> noise.in_one_bin().eigenvalues  # 70 / 40
            tensor([1.7500])
        """
        total = self.multiplicities.sum().reshape(1)
        mean = self.mass.sum() / total
        return replace(self, eigenvalues=mean, multiplicities=total, leading_directions=None)

    def of(self, rows: Tensor) -> "NoiseModel":
        """Return the same noise with what is known of some samples alone.

        For data-parallel training: fit on all training samples in every process, and give each
        the model of the samples it trains on.

        Args:
            rows: indices of samples, shape (m,).

        Raises:
            ValueError: if the indices are not integers in range.

        Example:
            >>> rank, processes = 0, 2  # as torch.distributed numbers them
            >>> mine = torch.arange(rank, 500, processes)
            >>> dd.NoiseModel.fit(X, y).of(mine).num_samples
            250
        """
        rows = torch.as_tensor(rows)
        known = self.fingerprints
        count = self.num_samples or self.fitted_on if known is None else len(known)
        if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise ValueError(
                f"NoiseModel: expected integer indices of shape (m,), got {tuple(rows.shape)} of "
                f"{rows.dtype}"
            )
        if len(rows) == 0 or int(rows.min()) < 0 or (count and int(rows.max()) >= count):
            raise ValueError(f"NoiseModel: expected indices of {count} samples, counted from 0")
        rows = rows.long()

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows.to(values.device)]

        some_of_all = replace(
            self,
            components=some(self.components),
            relative_mass=some(self.relative_mass),
            fingerprints=some(self.fingerprints),
            units=None if self.units is None else self.units.of(rows),
        )
        return some_of_all._with(self._apart.of(rows) if self._apart else None)

    def __str__(self) -> str:
        """One line: bins, effective rank (tr Σ)²/tr Σ², n/d, and how the norms vary."""
        return described(self)

    @property
    def is_followed_exactly(self) -> bool:
        """Whether no direction is left to the bins."""
        directions = self.mean_directions
        return directions is not None and directions.shape[0] == directions.shape[1]

    @property
    def effective_rank(self) -> float:
        """(tr Σ)² / tr Σ² of the bins."""
        return _effective_rank(self.eigenvalues, self.multiplicities)

    @property
    def ignores_heavy_tails(self) -> bool:
        """Whether norms vary far more than Gaussian ones of these bins, with one mass for all."""
        if self.relative_mass is not None or self.norm_variation is None:
            return False
        return _is_heavy_tailed(self.norm_variation**2, self.effective_rank)

    @property
    def dimension(self) -> int:
        """Input dimension d."""
        if self.mean_directions is not None:
            return len(self.mean_directions)
        return round(float(self.multiplicities.sum()))

    @property
    def num_samples(self) -> int | None:
        """Number of samples n that the model knows one by one, or None."""
        if self.units is not None:
            return len(self.units) if self.units.are_samples else self.units.count
        known = self.components if self.relative_mass is None else self.relative_mass
        return None if known is None else len(known)

    @property
    def row_components(self) -> Tensor | None:
        """Component of each row of the inputs, of its position too where samples have several."""
        if self.units is None or self.components is None or not self.units.are_samples:
            return self.components
        return self.components[self.units.unit] * self.units.places + self.units.place

    @property
    def mass(self) -> Tensor:
        """Noise mass τ_b = ν_b λ_b = E‖z‖² of each bin, shape (B,)."""
        return self.multiplicities * self.eigenvalues

    def to(self, device: torch.device, dtype: torch.dtype) -> "NoiseModel":
        """Return a copy with eigenvalues in ``dtype`` and every tensor on ``device``.

        Example:
            >>> dd.NoiseModel.fit(X, y).to(torch.device("cpu"), torch.float64).eigenvalues.dtype
            torch.float64
        """
        moved = replace(
            self,
            eigenvalues=self.eigenvalues.to(device, dtype),
            multiplicities=self.multiplicities.to(device, dtype),
            components=None if self.components is None else self.components.to(device),
            relative_mass=(
                None if self.relative_mass is None else self.relative_mass.to(device, dtype)
            ),
            mean_directions=(
                None if self.mean_directions is None else self.mean_directions.to(device, dtype)
            ),
            leading_directions=(
                None
                if self.leading_directions is None
                else self.leading_directions.to(device, dtype)
            ),
            fingerprints=None if self.fingerprints is None else self.fingerprints.to(device),
            units=None if self.units is None else self.units.to(device, dtype),
        )
        return moved._with(self._apart.to(device, dtype) if self._apart else None)

    def _with(self, separated: "NoiseModel | None") -> "NoiseModel":
        """The same model with its other form."""
        known = None if separated is None else self._measured
        return replace(self, separated=separated, separated_from=known)

    @property
    def _apart(self) -> "NoiseModel | None":
        """The other form, where it is that of this very noise."""
        return self.separated if self.is_in_both_forms else None

    @property
    def _measured(self) -> tuple[Tensor | None, ...]:
        return self.eigenvalues, self.multiplicities, self.relative_mass, self.components
