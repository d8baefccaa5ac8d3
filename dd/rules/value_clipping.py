"""Weight gradients that were clipped entry by entry."""

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients
from dd.functional import at_least_single
from dd.support.rounding import product_rounding

__all__ = ["unclipped_gradient"]

_UNITS_IN_THE_LAST_PLACE = 64


def unclipped_gradient(attachment: Attachment, pushes: StepGradients) -> tuple[Tensor, float]:
    """The gradient of the decoupled weight before ``clip_grad_value_``.

    Args:
        attachment: with the pending forwards of the step, on one process.
        pushes: their rows.

    Returns:
        The gradient, shape (k, d), and its scale over what backward passes delivered.

    Raises:
        ValueError: if the weight's gradient is no multiple of theirs clipped at one value, or the
            inputs are not known.
    """
    weight = attachment.weight
    assert weight.grad is not None
    found = at_least_single(weight.grad)
    parts = []
    for capture in pushes.captures:
        if capture.gradient is None or capture.inputs is None:
            raise ValueError("a forward whose inputs or gradient are not known")
        parts.append(
            at_least_single(capture.gradient.detach()).mT @ at_least_single(capture.inputs)
        )
    delivered = torch.stack(parts).sum(0)
    largest = found.abs().amax()
    # What is at the bound says nothing of the scale.
    below = found.abs() < (1 - 1e-6) * largest
    size = (delivered[below] ** 2).sum()
    scale = (found[below] * delivered[below]).sum() / size
    clipped = (scale * delivered).clamp(-largest, largest)
    rounding = _UNITS_IN_THE_LAST_PLACE * product_rounding(weight.grad)
    apart = torch.linalg.vector_norm(clipped - found)
    if not bool(apart <= rounding * torch.linalg.vector_norm(found)):
        raise ValueError("not a gradient clipped at one value")
    return scale * delivered, float(scale)
