"""Whether state evolution knows of a network and a loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_loss", "check_network"]

# Relative difference of a loss and the mean of its parts, in single precision over many samples.
_ROUNDING = 1e-3


def check_network(model: nn.Module, name: str, layer: nn.Linear, dimension: int) -> None:
    """Check a network whose decoupled layer was found.

    Args:
        model: the network.
        name: of the layer.
        layer: the decoupled one.
        dimension: d of the mixture.

    Raises:
        ValueError: if the layer has another size, is not trained or computed from other
            parameters, or the network draws random numbers.
    """
    if layer.in_features != dimension:
        raise ValueError(
            f"state_evolution: layer {name!r} takes {layer.in_features} inputs, but the mixture's "
            f"means have {dimension} coordinates"
        )
    if not isinstance(layer.weight, nn.Parameter) or not layer.weight.requires_grad:
        raise ValueError(
            f"state_evolution: the weight of layer {name!r} must be a trainable parameter of its "
            "own (not frozen, not parametrised)"
        )
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
            raise ValueError(
                f"state_evolution: the network has {module}, which is drawn anew at every forward, "
                "so that its training loss is not its test loss; leave it out"
            )


def check_loss(
    loss: Callable[[Tensor, Tensor], Any], outputs: Tensor, targets: Tensor, sizes: Sequence[int]
) -> None:
    """Check that a loss is the mean of the losses of samples.

    Args:
        loss: of outputs and targets.
        outputs: shape (N, ...).
        targets: shape (N, ...).
        sizes: of parts that the samples fall into.

    Raises:
        ValueError: if it is not.
    """
    whole = loss(outputs, targets)
    if not isinstance(whole, Tensor) or whole.numel() != 1:
        got = f"shape {tuple(whole.shape)}" if isinstance(whole, Tensor) else repr(type(whole))
        raise ValueError(f"state_evolution: expected a loss of one number in a tensor, got {got}")
    parts = zip(outputs.split(list(sizes)), targets.split(list(sizes)), strict=True)
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = sum(float(s) * float(loss(*part)) for s, part in zip(shares, parts, strict=True))
    # What is not finite is another error's.
    if abs(float(whole) - mean) > _ROUNDING * abs(mean):
        raise ValueError(
            f"state_evolution: the loss of all samples is {float(whole):.6g}, but the mean over "
            f"components {mean:.6g}; it must be the mean over samples of each one's own loss: no "
            "class weights, no reduction='sum'"
        )
