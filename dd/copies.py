"""Copies among the training samples, which leave their imprint on each other."""

import torch
from torch import Tensor

__all__ = ["count_copies"]

# Pairs that are compared entry by entry; of more than these a regular sample is taken.
_COMPARED = 1000


def count_copies(inputs: Tensor, projection: Tensor) -> int:
    """Number of samples that equal another one before them.

    Equal samples have equal projections but for rounding, so that only neighbours in the order of
    the projection are compared. Time n log n, and one pass over a thousand pairs at most.

    Args:
        inputs: X, shape (n, d).
        projection: Xu for one random u, shape (n,).

    Returns:
        The count; an estimate where more than a thousand pairs have nearly the same projection.
    """
    values, order = projection.sort()
    rounding = 4 * torch.finfo(values.dtype).eps * values.square().mean().sqrt()
    near = (values.diff() <= rounding).nonzero().squeeze(1)
    if len(near) == 0:
        return 0
    some = near[:: -(-len(near) // _COMPARED)]
    equal = (inputs[order[some]] == inputs[order[some + 1]]).all(1)
    return round(float(equal.double().mean()) * len(near))
