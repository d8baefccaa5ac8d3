"""Whether a weight gradient is still the one that the captured backward pass delivered."""

import torch
from torch import Tensor

__all__ = ["require_unedited"]

# Both sides are sums of the same terms; their roundings differ by at most about one unit in the
# last place of the sum of absolute terms, and far less when the roundings are independent.
_UNITS_IN_THE_LAST_PLACE = 32


def require_unedited(
    weight_gradient: Tensor, gradient: Tensor, direction: Tensor, projection: Tensor
) -> None:
    """Check GᵀX = ∂L/∂weight along one random direction u of the inputs: (∂L/∂weight) u = Gᵀ(Xu).

    The shadows follow G. They would part from the weights if the weights moved along anything else.

    Args:
        weight_gradient: ∂L/∂weight, shape (k, d).
        gradient: G, shape (n, k).
        direction: u, shape (d,).
        projection: Xu, shape (n,).

    Raises:
        RuntimeError: if the two sides differ by more than rounding.
    """
    projection = projection.to(gradient)
    arrived = weight_gradient @ direction.to(weight_gradient)
    delivered = gradient.mT @ projection
    terms = gradient.abs().mT @ projection.abs()
    tolerance = _UNITS_IN_THE_LAST_PLACE * _rounding(gradient) * terms
    if bool(((arrived - delivered).abs() <= tolerance).all()):
        return
    raise RuntimeError(
        "DecoupledDescent: the gradient of the decoupled layer's weight is not the one that the "
        "last backward pass delivered, so weights and shadows would part. It holds older gradients "
        "(call zero_grad() in every step), or it was edited (lower lr instead of clipping), or the "
        "loss has a term in the weights themselves (use weight_decay= for an L2 penalty)."
    )


def _rounding(gradient: Tensor) -> float:
    single = gradient.dtype == torch.float32 and gradient.device.type == "cuda"
    if single and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10  # TensorFloat-32
    return torch.finfo(gradient.dtype).eps
