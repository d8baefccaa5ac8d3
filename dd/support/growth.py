"""Tensors with a place for every sample, as samples are added."""

import torch
from torch import Tensor

__all__ = ["grown"]


def grown(values: Tensor, count: int, dim: int = 0) -> Tensor:
    """The same with zeros for samples that are new.

    Args:
        values: of some samples, numbered along a dimension.
        count: samples that there are now, no fewer.
        dim: the dimension.
    """
    missing = count - values.shape[dim]
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
