"""What a gradient scaler leaves to a fused update."""

import torch

__all__ = ["is_skipped", "unscaling"]


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step that is due will change nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscaling(optimizer: torch.optim.Optimizer) -> float:
    """What the update multiplies gradients by."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else 1.0 / float(scale)
