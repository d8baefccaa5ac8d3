"""The curvature of one step's loss, pooled with the steps before where samples are few."""

from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients
from dd.curvature.estimators import Rows
from dd.curvature.moments import Moments
from dd.functional import (
    all_finite,
    at_least_single,
)

__all__ = ["step_curvature"]


def step_curvature(
    attachment: Attachment, pushes: StepGradients, scale: float | Tensor, state: dict[str, Any]
) -> Tensor:
    """Estimate H of this step's loss, small batches pooled with the steps before.

    Args:
        attachment: of the layer.
        pushes: the step's rows.
        scale: of the step's gradient over that of the backward pass.
        state: of the decoupled weight.

    Returns:
        H, shape (k, k).

    Raises:
        FloatingPointError: if the second derivative is not finite.
        RuntimeError: if there are too few samples.
    """
    estimator = attachment.estimator
    # Sums over a scaled loss may be infinite.
    product, index = _scaled(pushes.product(), scale), pushes.placement.index
    pools = attachment.ranks.size > 1 or state.get("shadow_moments") is not None
    gradient = _scaled(pushes.gradient, scale)
    assert attachment.noise is not None
    rows = Rows(
        pushes.observed,
        product,
        index,
        attachment.ranks,
        pushes.preactivation,
        gradient,
        units=attachment.noise.units,
        pools=pools,
    )
    each = attachment.samples.rows_each or 1
    if estimator.sees_kinks and each > 1:
        attachment.oversight.look_at_pooling(pushes.gradient.unflatten(0, (-1, each)))
    moments = estimator.moments(rows)
    if isinstance(scale, Tensor):
        moments = moments.scaled(scale.to(moments.cross))
    found, kept = _pooled(attachment, moments, pushes, scale, state)
    _require_resolved(attachment, moments, found, pushes.gradient)
    if kept is not None:
        _keep_moments(attachment, state, kept)
    return found


def _pooled(
    attachment: Attachment,
    moments: Moments,
    pushes: StepGradients,
    scale: float | Tensor,
    state: dict[str, Any],
) -> tuple[Tensor, Moments | None]:
    """H of a step's moments and those of the steps before, and what to keep for the next."""
    estimator, width = attachment.estimator, pushes.gradient.shape[1]
    if estimator.pooled_rows == 0:
        return estimator.solve(moments), None
    samples = len(pushes.gradient) / (attachment.samples.rows_each or 1)
    keep = _keep(attachment, moments, samples, width)
    alone = pushes.placement.index is None and attachment.ranks.size == 1
    if keep == 0.0 and alone and state.get("shadow_moments") is None:
        # Nothing to pool with, nor likely to be pooled with what follows.
        return estimator.solve(moments), None
    # Steps of other loss scales and gradient scales are pooled in the unit of their gradients.
    unit = _gradient_size(attachment, pushes, scale)
    scaled = moments.scaled(1 / unit)
    if keep == 0.0:
        return estimator.solve(moments), scaled
    earlier = _unpacked(state.get("shadow_moments"), estimator.num_components, width)
    if earlier is not None:
        scaled = estimator.pooled(scaled, earlier, keep)
    return estimator.solve_pooled(scaled.scaled(unit)), scaled


def _require_resolved(
    attachment: Attachment, moments: Moments, curvature: Tensor, gradient: Tensor
) -> None:
    num_samples, dtype = len(gradient), gradient.dtype

    def explain(_: list[bool]) -> Exception:
        if not moments.is_finite:
            return _curvature_overflows(attachment, dtype)
        return RuntimeError(
            f"DecoupledDescent: {num_samples} samples do not resolve the curvature of the "
            f"{len(curvature)} units of layer {attachment.name!r}; use fewer units or more "
            'samples, or give component ids for curvature="stein"'
        )

    # Of moments that overflow, Σ a bᵀ shows in H, and Σ a aᵀ may leave it zero.
    attachment.verdicts.require(all_finite(moments.gram, curvature), explain)


def _keep_moments(attachment: Attachment, state: dict[str, Any], moments: Moments) -> None:
    packed, refusal = moments.packed(), attachment.verdicts.refusal
    if refusal is not None:
        before = state.get("shadow_moments")
        if before is None or before.shape != packed.shape:
            before = torch.zeros_like(packed)
        packed = torch.where(refusal > 0, before, packed)
    state["shadow_moments"] = packed


def _curvature_overflows(attachment: Attachment, dtype: torch.dtype) -> FloatingPointError:
    """What to say where the second derivative is not finite.

    Args:
        attachment: of the layer.
        dtype: of the gradient, which tells of autocast.
    """
    parameters = [parameter.detach() for parameter in attachment.module.parameters()]
    largest = max(float(p.abs().max()) for p in parameters if p.numel() > 0)
    precisions = {dtype, *(parameter.dtype for parameter in parameters)}
    half = torch.float16 in precisions
    return FloatingPointError(
        f"DecoupledDescent: the curvature at layer {attachment.name!r} is not finite, though the "
        "gradient is; nothing was updated. Likely causes: the learning rate is too large "
        f"(halve it; the largest weight is {largest:.2g})"
        + (", half precision that overflows" if half else "")
        + ", or a loss whose second derivative is infinite at some sample."
    )


def _scaled(rows: Tensor, scale: float | Tensor) -> Tensor:
    """Rows times a scale that is known; one that waits for the device is applied to sums."""
    return rows if isinstance(scale, Tensor) or scale == 1.0 else scale * at_least_single(rows)


def _gradient_size(attachment: Attachment, pushes: StepGradients, scale: float | Tensor) -> Tensor:
    """Σ_i ‖g_i‖ over all ranks, shape ()."""
    gradient = at_least_single(_scaled(pushes.gradient, scale))
    size = attachment.ranks.sum(torch.linalg.vector_norm(gradient, dim=1).sum())
    if isinstance(scale, Tensor):
        size = scale.abs().to(size) * size
    return size.clamp_min(torch.finfo(size.dtype).tiny)


def _keep(attachment: Attachment, moments: Moments, rows: float, width: int) -> float:
    """Weight of the moments of the steps before: none where a step holds enough samples."""
    total = attachment.samples.total(attachment.given_noise)
    if attachment.ranks.size > 1:
        # Every rank must come to the same curvature.
        rows = float(moments.rows)
        if not attachment.ranks_number_alike():
            total = float(attachment.ranks.sum(moments.rows.new_tensor(total)))
    return max(0.0, 1.0 - rows / min(total, attachment.estimator.pooled_rows * width))


def _unpacked(numbers: Tensor | None, count: int, width: int) -> Moments | None:
    return None if numbers is None else Moments.unpacked(numbers, count, width)
