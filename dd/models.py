"""The two-layer network of the experiments and its initialisation."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dd.checks import check_count, check_number

__all__ = ["ACTIVATIONS", "TanhSquared", "two_layer"]


class TanhSquared(nn.Module):
    """The activation tanh²: even, smooth and bounded."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return tanh² of every entry."""
        return inputs.tanh().square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "tanh_squared": TanhSquared,
}


def two_layer(
    dimension: int,
    width: int,
    num_outputs: int,
    *,
    activation: str = "gelu",
    hidden_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Return Linear(d, k), activation, Linear(k, C), all float32 on the CPU.

    Hidden weights are N(0, hidden_scale²/d), head weights N(0, 1/k), biases zero. The weights are
    drawn on the CPU, so that the device they are moved to does not change them.

    Args:
        dimension: number d of inputs.
        width: number k of hidden units.
        num_outputs: number C of outputs.
        activation: a key of :data:`ACTIVATIONS`.
        hidden_scale: standard deviation of a pre-activation when the inputs have unit mean square.
        generator: CPU generator; None is torch's global one.

    Raises:
        ValueError: if an argument is out of range or the activation unknown.
    """
    for name, size in (("dimension", dimension), ("width", width), ("num_outputs", num_outputs)):
        check_count(name, size)
    check_number("hidden_scale", hidden_scale)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    return nn.Sequential(
        _linear(dimension, width, hidden_scale / math.sqrt(dimension), generator),
        ACTIVATIONS[activation](),
        _linear(width, num_outputs, 1 / math.sqrt(width), generator),
    )


def _linear(inputs: int, outputs: int, std: float, generator: torch.Generator | None) -> nn.Linear:
    # Built without values: torch's own initialisation would draw from the global generator.
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32).to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
