"""Sums within mixture components."""

import torch
from torch import Tensor

from dd.support.blocks import row_blocks

__all__ = ["centre_within_components", "component_counts", "component_sums"]


def centre_within_components(values: Tensor, components: Tensor, num_components: int) -> Tensor:
    """Subtract from every row the mean of its mixture component: R − E[R | a].

    Args:
        values: shape (..., n, k).
        components: component of each row, shape (n,) or (..., n), integers in [0, num_components).
        num_components: number of components.

    Returns:
        Centred values, shape (..., n, k).
    """
    # A product instead of index_add, whose order of summation is not fixed on CUDA.
    membership = torch.nn.functional.one_hot(components, num_components).to(values.dtype)
    counts = membership.sum(-2).clamp_min(1)
    means = membership.mT @ values / counts.unsqueeze(-1)
    if components.dim() == 1:
        return values - means.index_select(-2, components)
    return values - membership @ means


def component_sums(values: Tensor, components: Tensor, num_components: int) -> Tensor:
    """Sum the rows of each mixture component, in the same order at every call.

    Args:
        values: shape (n, k).
        components: component of each row, shape (n,), integers in [0, num_components).
        num_components: number of components C.

    Returns:
        Shape (C, k).
    """
    if values.device.type == "cpu":
        sums = values.new_zeros(num_components, values.shape[1])
        return sums.index_add_(0, components, values)
    # A product instead of index_add, whose order of summation is not fixed on CUDA.
    total = values.new_zeros(num_components, values.shape[1])
    for rows in row_blocks(len(values), num_components, values.device):
        total.addmm_(_membership(components[rows], num_components).to(values.dtype), values[rows])
    return total


def component_counts(components: Tensor, num_components: int) -> Tensor:
    """Count the rows of each mixture component.

    Args:
        components: component of each row, shape (n,), integers in [0, num_components).
        num_components: number of components C.

    Returns:
        Integers, shape (C,).
    """
    if components.device.type == "cpu":
        return torch.bincount(components, minlength=num_components)
    # Counting by bincount waits for the device.
    blocks = row_blocks(len(components), num_components, components.device)
    counts = [_membership(components[rows], num_components).sum(1) for rows in blocks]
    return torch.stack(counts).sum(0)


def _membership(components: Tensor, num_components: int) -> Tensor:
    return torch.arange(num_components, device=components.device).unsqueeze(1) == components
