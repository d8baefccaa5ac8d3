"""The law of the inputs that the theory assumes: a Gaussian mixture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dd.noise.model import NoiseModel
from dd.support.checks import check_count, check_number

__all__ = ["GaussianMixture"]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Inputs x = μ_a + z, z ~ N(0, Σ), of component a with probability p_a.

    The target is a function of the component. Where the same inputs can have several targets, as
    under label noise, give a component for each of them, with equal means.

    Attributes:
        means: μ, shape (A, d). Where the noise model has several bins, in the eigenbasis of Σ: the
            first ν_1 coordinates are those of the first bin, and so on.
        targets: of each component, shape (A, ...), as the loss takes them.
        noise: σ, the standard deviation of every coordinate, or the bins of Σ.
        weights: p, shape (A,), positive with sum 1; None: all alike.

    Raises:
        TypeError: if means, targets or weights are no tensors.
        ValueError: if shapes disagree, a number is not finite, the weights are no probabilities, or
            the noise model is not that of one Gaussian around each mean.

    Example:
        >>> means = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> mixture = dd.GaussianMixture(means, targets=torch.tensor([0, 0, 1, 1]), noise=0.5)
        >>> mixture.dimension, mixture.probabilities.tolist()
        (2, [0.25, 0.25, 0.25, 0.25])
    """

    means: Tensor
    targets: Tensor
    noise: NoiseModel | float = 1.0
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("means", "targets", "weights"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (name, value) != ("weights", None):
                raise TypeError(
                    f"GaussianMixture: expected {name} in a tensor, got {type(value)}; use "
                    "torch.as_tensor"
                )
        if self.means.ndim != 2 or self.means.numel() == 0:
            raise ValueError(
                "GaussianMixture: expected means of shape (components, dimension), neither zero, "
                f"got {tuple(self.means.shape)}"
            )
        if not bool(self.means.isfinite().all()):
            raise ValueError("GaussianMixture: means must be finite")
        if self.targets.ndim < 1 or len(self.targets) != len(self.means):
            raise ValueError(
                f"GaussianMixture: expected a target for each of {len(self.means)} components, got "
                f"shape {tuple(self.targets.shape)}"
            )
        if self.weights is not None:
            _check_weights(self.weights, len(self.means))
        if isinstance(self.noise, NoiseModel):
            _check_noise(self.noise, self.dimension)
        else:
            check_number("GaussianMixture: noise", self.noise)

    @property
    def dimension(self) -> int:
        """Number d of input coordinates."""
        return self.means.shape[1]

    @property
    def probabilities(self) -> Tensor:
        """p, shape (A,), float64."""
        count = len(self.means)
        if self.weights is None:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        return self.weights.double().cpu()

    @property
    def eigenvalues(self) -> Tensor:
        """λ, noise variance of each bin, shape (B,), float64."""
        if isinstance(self.noise, NoiseModel):
            return self.noise.eigenvalues.double().cpu()
        return torch.tensor([self.noise**2], dtype=torch.float64)

    @property
    def multiplicities(self) -> list[int]:
        """ν, coordinates of each bin."""
        if isinstance(self.noise, NoiseModel):
            return [round(float(count)) for count in self.noise.multiplicities]
        return [self.dimension]

    def sample(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw independent samples on the CPU.

        Args:
            count: number n of samples.
            generator: CPU generator; None is torch's global one.

        Returns:
            Inputs (n, d) in float32, their targets (n, ...) and their components (n,).

        Raises:
            ValueError: if the count is not a positive integer.

        Example:
            >>> mixture = dd.GaussianMixture(torch.eye(2, 50), targets=torch.arange(2))
            >>> inputs, targets, components = mixture.sample(500, torch.Generator().manual_seed(0))
            >>> inputs.shape, torch.equal(targets, components)
            (torch.Size([500, 50]), True)
        """
        check_count("GaussianMixture: count", count)
        p = self.probabilities
        components = torch.multinomial(p, count, replacement=True, generator=generator)
        scale = self.eigenvalues.sqrt().repeat_interleave(torch.tensor(self.multiplicities))
        inputs = torch.randn(count, self.dimension, generator=generator, dtype=torch.float32)
        inputs = inputs.mul_(scale.float()).add_(self.means.float().cpu()[components])
        return inputs, self.targets.cpu()[components], components


def _check_weights(weights: Tensor, components: int) -> None:
    found = weights.double()
    if (
        weights.shape != (components,)
        or not bool((found > 0).all())
        or abs(float(found.sum()) - 1) > 1e-5
    ):
        raise ValueError(
            f"GaussianMixture: expected {components} positive weights of sum 1, got {weights}"
        )


def _check_noise(noise: NoiseModel, dimension: int) -> None:
    if noise.mean_directions is not None:
        raise ValueError(
            "GaussianMixture: the noise model describes the noise beside the component means alone;"
            " fit it with separate_means=False"
        )
    if noise.relative_mass is not None:
        raise ValueError(
            "GaussianMixture: the noise model gives every sample a mass of its own, and so its "
            "noise is not Gaussian; fit it with per_sample=False"
        )
    counts = noise.multiplicities.double()
    if not bool(((counts - counts.round()).abs() <= 1e-6 * counts).all()):
        raise ValueError(
            "GaussianMixture: every bin takes a whole number of coordinates, and the noise model "
            f"has multiplicities {counts.tolist()}, as NoiseModel.fit finds them; give the bins of "
            "Σ as they are, NoiseModel(eigenvalues, multiplicities)"
        )
    if noise.dimension != dimension:
        raise ValueError(
            f"GaussianMixture: the noise model has {noise.dimension} dimensions, the means "
            f"{dimension}"
        )
