"""How far samples of pre-activations are from a Gaussian law."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dd.tracking.history import Array

# Of a curve.
MOST_POINTS = 400


class Law(NamedTuple):
    """Means (A, k) and covariance (k, k) of pre-activations, float64."""

    means: Tensor
    covariance: Tensor


class Sample(NamedTuple):
    """Whitened pre-activations (n, k), the leading coordinate first, and their components (n,)."""

    values: Array
    components: Array

    @property
    def leading(self) -> list[Array]:
        """The leading coordinate of each component, sorted."""
        kinds = range(self.components.max() + 1)
        return [np.sort(self.values[self.components == kind, 0]) for kind in kinds]


def whitened(rows: Tensor, components: Tensor, law: Law) -> Sample:
    """All principal coordinates of rows (n, k) under a law, in its standard deviations."""
    variances, axes = torch.linalg.eigh(law.covariance)
    # An axis has no sign of its own.
    scaled = axes * axes.sum(0).sign() / variances.sqrt()
    coordinates = (rows.double() - law.means[components]) @ scaled
    return Sample(coordinates.flip(1).numpy(), components.numpy())


def ranks(total: int) -> Array:
    """Ranks from 1 of the order statistics that are drawn, dense at both ends, ascending."""
    ends = np.geomspace(1, (total + 1) / 2, MOST_POINTS // 2).astype(int)
    return np.unique(np.concatenate([ends, total + 1 - ends]))


def band(total: int, rank: Array) -> tuple[Array, Array]:
    """Where an order statistic of so many normal numbers lies with probability 0.99."""
    low, high = (stats.beta.ppf(p, rank, total + 1 - rank) for p in (0.005, 0.995))
    return stats.norm.ppf(low), stats.norm.ppf(high)


def distance(values: Array) -> float:
    """Kolmogorov-Smirnov distance of values from N(0, 1)."""
    return float(stats.kstest(values, "norm").statistic)
