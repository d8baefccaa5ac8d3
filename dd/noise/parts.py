"""What a noise model is made of, measured."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dd.noise.centred import CentredInputs
from dd.noise.measures import (
    _effective_rank,
    _is_flat,
    _is_heavy_tailed,
    _one_bin,
    _relative_mass,
    _sample_spectrum,
)
from dd.noise.quadrature import leading_counts, nodes
from dd.noise.spectrum import SampleSpectrum, population_eigenvalues
from dd.noise.unit_fit import UnitInputs

__all__ = ["measured", "measured_units", "refuse_for_units"]

MOST_BINS = 12
# Directions of the leading bins are kept up to this share of all and of the samples: a step on all
# of these takes products with that many more.
MOST_LEADING, LEADING_PER_SAMPLE = 0.5, 1 / 16


def measured(
    centred: CentredInputs, norms: Tensor, bins: int | None, *, per_sample: bool | None
) -> dict[str, Any]:
    """Fields of a noise model of samples of one row.

    Args:
        centred: the inputs around their means.
        norms: ‖z_i‖², shape (n,).
        bins: as in :meth:`dd.NoiseModel.fit`, as is the next.
        per_sample: whether each sample has a mass of its own.
    """
    relative = _relative_mass(centred, norms)
    binned, per_sample = _binned(centred, norms, relative, bins, per_sample)
    leading = binned.leading(centred)
    return {
        **_bins(centred, binned),
        "leading_directions": None if leading is None else leading.to(centred.dtype),
        "components": centred.components,
        "relative_mass": relative if per_sample else None,
        "fitted_on": len(relative),
        "norm_variation": float(relative.double().std(correction=0)),
        "fingerprints": centred.fingerprints,
        "copies": centred.copies,
    }


def measured_units(
    given: UnitInputs, centred: CentredInputs, norms: Tensor, bins: int | None
) -> dict[str, Any]:
    """Fields of a noise model of rows that share noise.

    Args:
        given: the rows.
        centred: these around their means.
        norms: ‖z‖² of each.
        bins: as in :meth:`dd.NoiseModel.fit`.
    """
    units = given.units(centred)
    centred.independence = given.independence(units)
    fingerprints, components = given.fingerprints(centred), given.of_samples
    binned, _ = _binned(centred, norms, norms, bins, per_sample=False)
    return {
        **_bins(centred, binned),
        "components": None if components is None else components.to(centred.device),
        "fitted_on": len(fingerprints),
        "fingerprints": fingerprints,
        "copies": given.copies(centred, fingerprints),
        "units": units,
    }


def refuse_for_units(per_sample: bool | None, separate_means: bool | None) -> None:
    """Refuse what does not go with rows that share noise.

    Raises:
        ValueError: if a mass for all, or the means apart, are asked for.
    """
    if separate_means:
        raise ValueError(
            "NoiseModel: separate_means is for head=True, which does not follow samples of "
            "several rows yet; leave it out, and use head=False"
        )
    if per_sample is False:
        raise ValueError(
            "NoiseModel: rows that share noise have the masses of their own Gram matrices; leave "
            "per_sample out"
        )


@dataclass(frozen=True, eq=False)
class _Binned:
    """Bins of a spectrum, and the sample's own one where it is known."""

    eigenvalues: Tensor
    multiplicities: Tensor
    sample: SampleSpectrum | None = None

    def leading(self, centred: CentredInputs) -> Tensor | None:
        """Directions of the leading bins, shape (d, r), float64, or None."""
        # Without components no response is followed bin by bin.
        if self.sample is None or centred.components is None:
            return None
        count, dimension = len(centred.source), centred.dimension
        most = int(min(MOST_LEADING * dimension, LEADING_PER_SAMPLE * count))
        most = min(most, len(self.sample.values))
        count = max(leading_counts(self.multiplicities, most), default=0)
        return self.sample.leading(count) if count else None


def _bins(centred: CentredInputs, binned: _Binned) -> dict[str, Any]:
    like, directions = centred.means.to(centred.dtype), centred.directions
    return {
        "eigenvalues": binned.eigenvalues.to(like),
        "multiplicities": binned.multiplicities.to(like),
        "mean_directions": None if directions is None else directions.to(like),
    }


def _binned(
    centred: CentredInputs,
    norms: Tensor,
    relative: Tensor,
    bins: int | None,
    per_sample: bool | None,
) -> tuple[_Binned, bool]:
    """Bins, and whether each sample has a mass of its own."""
    if bins == 1 and per_sample is False:
        return _Binned(*_one_bin(centred, norms)), False
    found = _sample_spectrum(centred)
    sample = found.values
    spectrum = population_eigenvalues(sample, centred.dimension, centred.effective_degrees)
    if bins is None:
        flat = _is_flat(sample, centred.dimension, centred.effective_degrees)
        bins = 1 if flat else MOST_BINS
    if per_sample is None:
        variance, rank = float(relative.double().var()), _effective_rank(spectrum)
        per_sample = centred.components is not None and _is_heavy_tailed(variance, rank)
    if bins == 1:
        return _Binned(*_one_bin(centred, norms)), per_sample
    return _Binned(*nodes(spectrum, bins), found), per_sample
