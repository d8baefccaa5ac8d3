"""Whether weights and weight gradients are still those that the shadows belong to."""

import torch
from torch import Tensor

from dd.functional import at_least_single

__all__ = ["require_same_weight", "require_unedited"]

# The matrix product behind the weight gradient rounds each term by about a unit in the last place
# and loses up to about √n/16 more in its longest sums; measured up to 3 for n up to 300 000.
_UNITS_IN_THE_LAST_PLACE = 32
_LONG_SUM = 256

_SAME_WEIGHT_TOLERANCE = 1e-4


def require_unedited(
    weight_gradient: Tensor,
    gradient: Tensor,
    direction: Tensor,
    projection: Tensor,
    name: str = "the decoupled layer's weight",
) -> None:
    """Check GᵀX = ∂L/∂weight along one random direction u of the inputs: (∂L/∂weight) u = Gᵀ(Xu).

    The shadows follow G. They would part from the weights if the weights moved along anything else.

    Args:
        weight_gradient: ∂L/∂weight, shape (k, d).
        gradient: G, shape (n, k).
        direction: u, shape (d,).
        projection: Xu, shape (n,).
        name: of the parameter, for the error.

    Raises:
        RuntimeError: if the two sides differ by more than rounding.
    """
    rounding = max(_rounding(gradient), _rounding(weight_gradient))
    gradient = at_least_single(gradient)
    projection = projection.to(gradient)
    arrived = at_least_single(weight_gradient) @ direction.to(gradient)
    delivered = (gradient * projection.unsqueeze(1)).sum(0)
    # A sample whose projection happens to be small still rounds like one of ordinary size.
    sizes = projection.abs() + projection.square().mean().sqrt()
    length = max(1.0, (len(projection) / _LONG_SUM) ** 0.5)
    tolerance = _UNITS_IN_THE_LAST_PLACE * length * rounding * (gradient.abs().mT @ sizes)
    if bool(((arrived - delivered).abs() <= tolerance).all()):
        return
    raise RuntimeError(
        f"DecoupledDescent: the gradient of {name} is not the one that the "
        "last backward pass delivered, so weights and shadows would part. It holds older gradients "
        "(call zero_grad() in every step), or it was edited (lower lr instead of clipping; no "
        "gradient scaler), or the loss has a term in the weights themselves (use weight_decay= for "
        "an L2 penalty)."
    )


def require_same_weight(
    weight: Tensor,
    direction: Tensor,
    expected: Tensor,
    name: str = "the decoupled layer's weight",
) -> None:
    """Check along one random direction u that the weight is the one the last step left.

    Args:
        weight: shape (k, d).
        direction: u, shape (d,).
        expected: weight @ u after the last step, shape (k,).
        name: of the parameter, for the error.

    Raises:
        RuntimeError: if it is another weight.
    """
    found = at_least_single(weight) @ direction.to(weight.device, expected.dtype)
    expected = expected.to(found)
    scale = expected.square().mean().sqrt()
    if bool(((found - expected).abs() <= _SAME_WEIGHT_TOLERANCE * scale).all()):
        return
    raise RuntimeError(
        f"DecoupledDescent: {name} was changed outside step(), and the "
        "shadows do not fit it. Restore model and optimizer together (load_state_dict of both), "
        "or start over with detach() and attach(); constrain weights with weight_decay=."
    )


def _rounding(tensor: Tensor) -> float:
    if tensor.dtype == torch.float32 and tensor.device.type == "cuda" and _tensor_float_32():
        return 2.0**-10
    return torch.finfo(tensor.dtype).eps


def _tensor_float_32() -> bool:
    # The older getter raises once the newer setting, which torch 2.9 brought, has been used.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return precision == "tf32"
