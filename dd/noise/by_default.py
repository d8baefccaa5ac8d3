"""The noise model of those who give none."""

import numpy as np
from torch import Tensor

from dd.noise.measures import LARGEST_GRAM
from dd.noise.model import NoiseModel

__all__ = ["fitted_by_default"]


def fitted_by_default(inputs: Tensor | np.ndarray, bins: int | None) -> NoiseModel:
    """Fit a noise model without components, isotropic where the spectrum takes too much memory.

    Args:
        inputs: of all training samples, shape (n, d).
        bins: at most so many; by default as the spectrum asks for.

    Raises:
        ValueError: as :meth:`dd.NoiseModel.fit`.
    """
    if min(inputs.shape) > LARGEST_GRAM:
        return NoiseModel.isotropic(inputs)
    return NoiseModel.fit(inputs, bins=bins)
