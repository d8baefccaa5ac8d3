"""What a backward pass adds to the gradient of the decoupled weight, seen where it is made."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ProjectedTerm", "along", "product_node"]

_PRODUCTS = ("AddmmBackward0", "MmBackward0")


@dataclass(frozen=True, eq=False)
class ProjectedTerm:
    """A term XᵀG of a weight gradient, along random directions U of the inputs.

    Attributes:
        along: Uᵀ XᵀG, shape (j, k), in double precision.
        rounding: relative error of one of its numbers, once an edit has rounded it.
    """

    along: Tensor
    rounding: float

    @classmethod
    def of(cls, term: Tensor, directions: Tensor) -> "ProjectedTerm":
        """Look at a term.

        Args:
            term: (XᵀG)ᵀ, shape (k, d).
            directions: Uᵀ, shape (j, d).
        """
        return cls(along(term, directions), torch.finfo(term.dtype).eps)


def along(gradient: Tensor, directions: Tensor) -> Tensor:
    """A weight gradient (k, d) along directions (j, d); shape (j, k), in double precision.

    Which neither a setting of the user's lowers nor a scaled loss exceeds.
    """
    gradient = gradient.detach().double()
    return (gradient @ directions.to(gradient).mT).mT


def product_node(output: Tensor, weight: Tensor) -> Any:
    """The node of the autograd graph whose last result is a layer's term of its weight's gradient.

    Args:
        output: of the layer, shape (m, k).
        weight: of the layer, shape (k, d).

    Returns:
        The node, or None where the layer computes XW otherwise than by one matrix product.
    """
    node = output.grad_fn
    if node is None or node.name() not in _PRODUCTS:
        return None
    turned = node.next_functions[-1][0]
    if turned is None or turned.name() != "TBackward0":
        return None
    leaf = turned.next_functions[0][0]
    return node if getattr(leaf, "variable", None) is weight else None
