"""Whether the head is corrected for its own over-fitting where nothing is said."""

from torch import nn

from dd.layers import find_head
from dd.noise import NoiseModel

__all__ = ["AUTO", "is_worth_correcting", "shared_count", "uncorrected_count"]

AUTO = "auto"

# Below this share of the samples the over-fitting of what all share is within the sampling error
# (docs/when-to-trust.md, the table of the head's choice).
FEWEST_PER_SAMPLE = 0.05
# n p² beyond this takes a large part of a second a step on two cores.
MOST_WORK = 5e8


def is_worth_correcting(module: nn.Module, layer: nn.Linear, noise: NoiseModel | None) -> bool:
    """Whether the head is to be corrected, by the sizes of model and data.

    It is where what all samples share is much for the samples and not too much to follow, and the
    noise model knows the component means, along which the decoupled layer over-fits as a head does.

    Args:
        module: the model.
        layer: the decoupled layer.
        noise: the noise model, or None where one will be fitted without components.
    """
    if noise is None or noise.fitted_on is None:
        return False
    if noise.mean_directions is not None:
        # Only the head's correction follows what this model leaves out.
        return True
    if noise.separated is None or not noise.is_in_both_forms:
        return False
    try:
        head = find_head(module, layer, choice=True)[1]
    except (ValueError, TypeError):
        return False
    directions = noise.separated.mean_directions
    assert directions is not None
    n, count = noise.fitted_on, shared_count(layer, head, directions.shape[1])
    return FEWEST_PER_SAMPLE * n < count and n * count**2 <= MOST_WORK


def shared_count(layer: nn.Linear, head: nn.Linear, means: int) -> int:
    """Numbers that all samples share: the decoupled layer along the means, its bias, and the head.

    Args:
        layer: the decoupled layer.
        head: the last layer.
        means: dimensions that the component means span.
    """
    along = layer.out_features * (means + _has_trained_bias(layer))
    return along + head.out_features * (head.in_features + _has_trained_bias(head))


def _has_trained_bias(linear: nn.Linear) -> bool:
    return linear.bias is not None and linear.bias.requires_grad


def uncorrected_count(
    module: nn.Module, layer: nn.Linear, noise: NoiseModel | None, corrected: set[int]
) -> int:
    """Trained numbers that over-fit uncounted: beside the decoupled weight, and in it along means.

    Args:
        module: the model.
        layer: the decoupled layer.
        noise: the noise model.
        corrected: ``id`` of every parameter with a shadow.
    """
    others = (p for p in module.parameters() if id(p) not in corrected)
    count = sum(p.numel() for p in others if p.requires_grad)
    if noise is not None and noise.mean_directions is not None:
        return count
    if noise is not None and noise.components is not None:
        components = int(noise.components.max()) + 1
    else:
        # As many classes as the network tells apart.
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
        components = linear[-1].out_features
    return count + layer.out_features * min(max(components - 1, 0), layer.in_features)
