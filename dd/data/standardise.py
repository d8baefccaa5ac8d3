"""Features brought to one scale by the training samples."""

import numpy as np
import torch
from torch import Tensor

from dd.data.constant import constant_columns

__all__ = ["SCALINGS", "check_scaling", "standardise"]

SCALINGS = ("coordinate", "global")


def check_scaling(scaling: str) -> None:
    """Reject an unknown scaling.

    Raises:
        ValueError: if it is not one of :data:`SCALINGS`.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")


def standardise(train: Tensor, test: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 rows of mean 0 in each coordinate of the training rows and mean square 1.

    A coordinate that is constant in the training rows, up to rounding, is 0 in all rows.

    Args:
        train: shape (n, d), finite.
        test: shape (n_test, d), shifted and scaled as the training rows are.
        scaling: ``"coordinate"`` divides each coordinate by its own standard deviation,
            ``"global"`` all of them by one, the root of their mean variance.

    Returns:
        The training rows, the test rows, and which coordinates are constant, shape (d,).

    Raises:
        ValueError: if no coordinate varies, or a test row is so far off that it leaves the range
            of float32.
    """
    # In float64 a constant coordinate cannot pass for one that varies, nor a sum overflow.
    train, test = train.double(), test.double()
    varies = ~torch.from_numpy(constant_columns(np.asarray(train)))
    if not bool(varies.any()):
        raise ValueError(
            f"the {len(train)} training samples are all equal and cannot be standardised; raise "
            "num_train"
        )
    mean = train.mean(0)
    # Squares of the centred values themselves may be beyond float64.
    centred = train - mean
    size = centred.abs().amax(0) if scaling == "coordinate" else centred[:, varies].abs().amax()
    size = torch.where(varies, size, 1.0)
    variance = (centred / size).square().mean(0)
    if scaling == "global":
        variance = variance[varies].mean().expand_as(variance)
    deviation = torch.where(varies, variance.sqrt() * size, torch.inf)
    inputs, test_inputs = (centred / deviation).float(), ((test - mean) / deviation).float()
    far = ~test_inputs.isfinite()
    if bool(far.any()):
        raise ValueError(
            f"{int(far.any(1).sum())} test samples are beyond 3.4e38 standard deviations of the "
            "training samples; are both in the same units?"
        )
    return inputs, test_inputs, ~varies
