"""Whether weights and weight gradients are still those that the shadows belong to."""

import torch
from torch import Tensor

from dd.functional import at_least_single
from dd.ranks import Ranks

__all__ = ["edit_scale", "require_same_weight", "require_unedited"]

# The matrix product behind the weight gradient rounds each term by about a unit in the last place
# and loses up to about √n/16 more in its longest sums; measured up to 3 for n up to 300 000.
_UNITS_IN_THE_LAST_PLACE = 32
_LONG_SUM = 256

_SAME_WEIGHT_TOLERANCE = 1e-4


def edit_scale(
    weight_gradient: Tensor,
    gradient: Tensor,
    directions: Tensor,
    projections: Tensor,
    ranks: Ranks,
) -> float:
    """By which scale the weight gradient differs from the one that the backward pass delivered.

    GᵀX = ∂L/∂weight is compared along the random directions U of the inputs: (∂L/∂weight) U against
    Gᵀ(XU). The shadows follow G. They would part from the weights if the weights moved along
    anything else than a multiple of it.

    Args:
        weight_gradient: ∂L/∂weight, shape (k, d).
        gradient: G, shape (m, k).
        directions: Uᵀ, shape (j, d).
        projections: XU, shape (m, j).
        ranks: which share the rows, and average their weight gradients.

    Returns:
        The scale; 1 where the two agree up to rounding.

    Raises:
        RuntimeError: if they differ by more than a scale.
    """
    rounding = max(_rounding(gradient), _rounding(weight_gradient))
    gradient, size = _of_size_one(gradient, ranks)
    weight_gradient, weight_size = _of_size_one(weight_gradient)
    arrived = weight_gradient @ directions.mT.to(gradient)
    delivered, tolerance = _delivered(gradient, projections, rounding, ranks)
    if bool(((weight_size / size * arrived - delivered).abs() <= tolerance).all()):
        return 1.0
    a, b = arrived.double(), delivered.double()
    scale = float((a * b).sum() / b.square().sum().clamp_min(torch.finfo(b.dtype).tiny))
    # An edit rounds the gradient once more.
    tolerance = abs(scale) * tolerance + 4 * rounding * arrived.abs().amax()
    if scale != 0 and bool(((arrived - scale * delivered).abs() <= tolerance).all()):
        return scale * float(weight_size.double() / size)
    raise RuntimeError(
        "DecoupledDescent: the gradient of the decoupled layer's weight is not the one that the "
        "last backward passes delivered, nor a multiple of it, so weights and shadows would part. "
        "It holds older gradients (call zero_grad() after every step), or it was edited entry by "
        "entry (clip by norm instead of by value), or the loss has a term in the weights "
        f"themselves (use weight_decay= for an L2 penalty){_on_processes(ranks)}."
    )


def require_unedited(
    found: Tensor,
    gradient: Tensor,
    direction: Tensor,
    projection: Tensor,
    name: str,
    scale: float,
    ranks: Ranks,
) -> None:
    """Check that a gradient is the one delivered, times the scale of the decoupled weight's.

    Args:
        found: gradient of a parameter, shape (o, i).
        gradient: gradient of what it yields, shape (m, o).
        direction: shape (i,).
        projection: the parameter's inputs along the direction, shape (m,).
        name: of the parameter, for the error.
        scale: as :func:`edit_scale` returns it.
        ranks: which share the rows.

    Raises:
        RuntimeError: if the two sides differ by more than rounding.
    """
    rounding = max(_rounding(gradient), _rounding(found))
    gradient, size = _of_size_one(gradient, ranks)
    found, found_size = _of_size_one(found)
    arrived = (found @ direction.to(gradient)).unsqueeze(1) * (found_size / size / scale)
    delivered, tolerance = _delivered(gradient, projection.unsqueeze(1), rounding, ranks)
    tolerance = tolerance + 4 * rounding * arrived.abs().amax() * (scale != 1)
    if bool(((arrived - delivered).abs() <= tolerance).all()):
        return
    raise RuntimeError(
        f"DecoupledDescent: the gradient of {name} is not the one that the last backward passes "
        f"delivered{'' if scale == 1 else f' times {scale:.4g}, the scale of the first layer'}; "
        "head=True follows it. Call zero_grad() after every step, edit all gradients by one scale "
        "(clip by the norm of all of them), and keep terms in the weights out of the loss."
    )


def _of_size_one(gradient: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """A gradient over about its largest entry, and that; sums over a scaled one may be infinite."""
    gradient = at_least_single(gradient)
    size = gradient.abs().amax()
    if ranks is not None:
        size = ranks.sum(size) / ranks.size
    size = size.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / size, size


def _delivered(
    gradient: Tensor, projections: Tensor, rounding: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Gᵀ(XU), shape (k, j), as ranks average it, and what rounding may add to it."""
    projections = projections.to(gradient)
    delivered = gradient.mT @ projections
    # A sample whose projection happens to be small still rounds like one of ordinary size.
    sizes = projections.abs() + projections.square().mean(0).sqrt()
    length = max(1.0, (len(projections) / _LONG_SUM) ** 0.5)
    tolerance = _UNITS_IN_THE_LAST_PLACE * length * rounding * (gradient.abs().mT @ sizes)
    if ranks.size > 1:
        delivered, tolerance = ranks.sum(torch.stack([delivered, tolerance])) / ranks.size
    return delivered, tolerance


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
    found = at_least_single(weight)
    found = found @ direction.to(found)
    expected = expected.to(found)
    scale = expected.square().mean().sqrt()
    if bool(((found - expected).abs() <= _SAME_WEIGHT_TOLERANCE * scale).all()):
        return
    raise RuntimeError(
        f"DecoupledDescent: {name} was changed outside step(), and the "
        "shadows do not fit it. Restore model and optimizer together (load_state_dict of both), "
        "or start over with detach() and attach(); constrain weights with weight_decay=."
    )


def _on_processes(ranks: Ranks) -> str:
    distributed = torch.distributed
    if ranks.size > 1:
        return ", or the processes do not average it (wrap the model in DistributedDataParallel)"
    if distributed.is_available() and distributed.is_initialized():
        return ", or processes average it, which the optimizer was told to be apart (process_group)"
    return ""


def _rounding(tensor: Tensor) -> float:
    """Relative error of one product in the matrix products behind a gradient."""
    coarse = {"tf32": 2.0**-10, "bf16": 2.0**-8}
    if tensor.dtype == torch.float32 and (choice := _products(tensor.device.type)) in coarse:
        return coarse[choice]
    return torch.finfo(tensor.dtype).eps


def _products(device: str) -> str:
    """In what precision the user lets a device multiply float32 matrices."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    # The older getter raises once the newer setting, which torch 2.9 brought, has been used.
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is not None:
        return precision
    older = {"highest": "ieee", "high": "tf32", "medium": "tf32" if device == "cuda" else "bf16"}
    return older[torch.get_float32_matmul_precision()]
