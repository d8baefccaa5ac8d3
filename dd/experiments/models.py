"""The two-layer network of the experiments and its initialisation."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dd.support.checks import check_count, check_number
from dd.theory.mixture import GaussianMixture

__all__ = ["ACTIVATIONS", "TanhSquared", "informed_two_layer", "two_layer"]


class TanhSquared(nn.Module):
    """The activation tanh²: even, smooth and bounded.

    Example:
        >>> from dd.experiments.models import TanhSquared
        >>> TanhSquared()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.5800, 0.0000, 0.5800])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return tanh² of every entry.

        Example:
            >>> from dd.experiments.models import TanhSquared
            >>> TanhSquared().forward(torch.zeros(2))
            tensor([0., 0.])
        """
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

    Example:
        >>> from dd.experiments.models import two_layer
        >>> two_layer(dimension=50, width=4, num_outputs=2, activation="tanh")
        Sequential(
          (0): Linear(in_features=50, out_features=4, bias=True)
          (1): Tanh()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
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


def informed_two_layer(
    dimension: int,
    width: int,
    num_outputs: int,
    *,
    mixture: GaussianMixture,
    overlap: float,
    start_seed: int = 0,
    activation: str = "gelu",
    hidden_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Return the network of :func:`two_layer` started with a knowledge of the component means.

    Mean pre-activations M_a = Wᵀμ_a and head weights are those of ``start_seed``, the same for
    every realisation of means with the same inner products; the rest of the hidden weights is drawn
    by ``generator``. Such networks all follow one curve of state evolution.

    Args:
        dimension: as of :func:`two_layer`, like the following two and the last three.
        width: number k of hidden units.
        num_outputs: number C of outputs.
        mixture: gives the means, in ``dimension`` coordinates.
        overlap: standard deviation of M over components, units and starting seeds.
        start_seed: of what is alike.
        activation: a key of :data:`ACTIVATIONS`.
        hidden_scale: of the hidden weights beside the means.
        generator: CPU generator; None is torch's global one.

    Raises:
        ValueError: if an argument is out of range, the activation unknown, or the mixture of
            another dimension.

    Example:
        >>> from dd.experiments.models import informed_two_layer
        >>> mixture = dd.GaussianMixture(3.0 * torch.eye(2, 50), targets=torch.arange(2))
        >>> some, other = (
        ...     informed_two_layer(50, 4, 2, mixture=mixture, overlap=0.5) for _ in range(2)
        ... )
        >>> torch.allclose(some[0](mixture.means), other[0](mixture.means), atol=1e-5)
        True
    """
    check_number("overlap", overlap)
    check_count("start_seed", start_seed, least=0)
    if mixture.dimension != dimension:
        raise ValueError(
            f"the mixture's means have {mixture.dimension} coordinates, the network {dimension}"
        )
    model = two_layer(
        dimension,
        width,
        num_outputs,
        activation=activation,
        hidden_scale=hidden_scale,
        generator=generator,
    )
    layer, head = model[0], model[2]
    assert isinstance(layer, nn.Linear)
    assert isinstance(head, nn.Linear)
    alike = torch.Generator().manual_seed(start_seed)
    nn.init.normal_(head.weight, std=1 / math.sqrt(width), generator=alike)
    means = mixture.means.double().cpu()
    # Through the inner products alone, so that a rotation of the means rotates the start.
    gram = means @ means.T
    # Means in single precision are dependent up to its rounding alone.
    inverse = torch.linalg.pinv(gram, rtol=1e-6, hermitian=True)
    rank = int(torch.linalg.matrix_rank(gram, rtol=1e-6, hermitian=True))
    share = max(1, rank) / len(means)
    drawn = torch.randn(len(means), width, generator=alike, dtype=torch.float64)
    wanted = overlap / math.sqrt(share) * drawn
    with torch.no_grad():
        missing = wanted - means @ layer.weight.double().T
        layer.weight += (means.T @ inverse @ missing).T
    return model


def _linear(inputs: int, outputs: int, std: float, generator: torch.Generator | None) -> nn.Linear:
    # Built without values: torch's own initialisation would draw from the global generator.
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32).to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
