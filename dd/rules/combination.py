"""Weights that are a combination of known tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["combination"]

# Of the weight's length: what rounding leaves of a combination of a few tensors.
_EXACT = 1e-5


def combination(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Coefficients of a weight as a combination of tensors, shape (p,), or None.

    Args:
        weight: shape (k, d).
        tensors: p of the same shape.
    """
    columns = torch.stack([value.double().flatten() for value in tensors.values()], 1)
    target = weight.double().flatten()
    # By singular values: an average and what it averages may be the same.
    found = torch.linalg.lstsq(columns.cpu(), target[:, None].cpu(), driver="gelsd").solution[:, 0]
    found = found.to(target.device)
    rest = torch.linalg.vector_norm(columns @ found - target)
    return found if bool(rest <= _EXACT * torch.linalg.vector_norm(target)) else None
