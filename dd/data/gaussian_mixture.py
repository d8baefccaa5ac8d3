"""The XOR problem: four Gaussian clusters on two orthogonal axes."""

import torch
from torch import Tensor

from dd.data.seeding import generator
from dd.data.split import Split
from dd.support.checks import check_count, check_number
from dd.theory.mixture import GaussianMixture

__all__ = ["xor"]


def xor(
    *,
    dimension: int = 1000,
    num_train: int = 4000,
    num_test: int = 10000,
    separation: float = 2.5,
    noise: float = 1.0,
    seed: int = 0,
) -> Split:
    """Draw x = μ + noise · z with μ one of four equally likely cluster means ±μ_a, ±μ_b.

    μ_a and μ_b are orthogonal, of random direction. The label is the axis: 0 for ±μ_a, 1 for ±μ_b,
    so no linear function of x predicts it. Components are the clusters, 0 to 3.

    Args:
        dimension: number d of coordinates, at least 2.
        num_train: training samples.
        num_test: test samples.
        separation: norm of each cluster mean.
        noise: standard deviation of the noise in each coordinate.
        seed: non-negative integer.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from dd.data import xor
        >>> split = xor(dimension=50, num_train=500, num_test=100, seed=0)
        >>> split.train_inputs.shape, split.train_components.unique().tolist()
        (torch.Size([500, 50]), [0, 1, 2, 3])
    """
    check_count("dimension", dimension, least=2)
    check_count("num_train", num_train)
    check_count("num_test", num_test)
    check_number("separation", separation)
    check_number("noise", noise)
    means = separation * _directions(dimension, generator(seed, "data/means"))
    train, train_components = _sample(num_train, means, noise, generator(seed, "data/train"))
    test, test_components = _sample(num_test, means, noise, generator(seed, "data/test"))
    return Split(
        train_inputs=train,
        train_targets=train_components // 2,
        train_components=train_components,
        test_inputs=test,
        test_targets=test_components // 2,
        mixture=GaussianMixture(means, torch.arange(len(means)) // 2, noise),
    )


def _directions(dimension: int, source: torch.Generator) -> Tensor:
    """Return the four unit means +a, -a, +b, -b, shape (4, dimension)."""
    gaussian = torch.randn(dimension, 2, generator=source)
    a, b = torch.linalg.qr(gaussian).Q.T
    return torch.stack([a, -a, b, -b])


def _sample(
    count: int, means: Tensor, noise: float, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return inputs (count, d) and their components (count,)."""
    components = torch.randint(len(means), (count,), generator=source)
    inputs = torch.randn(count, means.shape[1], generator=source)
    return inputs.mul_(noise).add_(means[components]), components
