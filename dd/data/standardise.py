"""Features brought to one scale by the training samples."""

import torch
from torch import Tensor

__all__ = ["SCALINGS", "check_scaling", "standardise"]

SCALINGS = ("coordinate", "global")


def check_scaling(scaling: str) -> None:
    """Reject an unknown scaling.

    Raises:
        ValueError: if it is not one of :data:`SCALINGS`.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")


def standardise(train: Tensor, test: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Return float32 rows of mean 0 in each coordinate of the training rows and mean square 1.

    Args:
        train: shape (n, d).
        test: shape (n_test, d), shifted and scaled as the training rows are.
        scaling: ``"coordinate"`` divides each coordinate by its own standard deviation,
            ``"global"`` all of them by one, the root of their mean variance.

    Raises:
        ValueError: if no coordinate varies.
    """
    # In float64 a constant coordinate cannot pass for one that varies, nor a sum overflow.
    train, test = train.double(), test.double()
    varies = train.amax(0) > train.amin(0)
    if not bool(varies.any()):
        raise ValueError(
            f"the {len(train)} training samples are all equal and cannot be standardised; raise "
            "num_train"
        )
    mean = train.mean(0)
    variance = train.var(0, correction=0)
    if scaling == "global":
        variance = variance[varies].mean().expand_as(variance)
    scale = torch.where(varies, variance.rsqrt(), 0.0)
    return ((train - mean) * scale).float(), ((test - mean) * scale).float()
