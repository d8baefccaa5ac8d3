"""The noise that a sample carries around the mean of its mixture component."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dd.functional import centre_within_components

__all__ = ["NoiseModel"]


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """Covariance of the inputs within mixture components, reduced to eigenvalue bins.

    An input is x_i = μ_{a(i)} + z_i with z_i ~ N(0, Σ); this holds what decoupled descent has to
    know of Σ and of the components a(i).

    Attributes:
        eigenvalues: λ, noise variance per coordinate of each bin, in squared input units,
            shape (B,).
        multiplicities: ν, dimension of each bin, shape (B,); they sum to the input dimension d.
        components: component of each sample in the order of the training batch, shape (n,),
            integers from 0; None when the components are unknown.

    Raises:
        ValueError: if a shape or value cannot describe a covariance.
    """

    eigenvalues: Tensor
    multiplicities: Tensor
    components: Tensor | None = None

    def __post_init__(self) -> None:
        if self.eigenvalues.dim() != 1 or self.eigenvalues.shape != self.multiplicities.shape:
            raise ValueError(
                "NoiseModel: expected eigenvalues and multiplicities of one shape (bins,), got "
                f"{tuple(self.eigenvalues.shape)} and {tuple(self.multiplicities.shape)}"
            )
        if not bool(torch.isfinite(self.eigenvalues).all() and (self.eigenvalues >= 0).all()):
            raise ValueError(
                f"NoiseModel: eigenvalues must be finite and not negative, got {self.eigenvalues}; "
                "clip rounding errors at 0"
            )
        if not bool((self.multiplicities > 0).all()):
            raise ValueError(
                f"NoiseModel: multiplicities must be positive, got {self.multiplicities}"
            )
        if self.components is not None:
            _as_components(self.components, len(self.components))

    @classmethod
    def isotropic(
        cls, inputs: Tensor | np.ndarray, components: Tensor | np.ndarray | None = None
    ) -> "NoiseModel":
        """Estimate Σ = λI, with λ = tr Σ / d from the inputs around their component means.

        Args:
            inputs: training inputs, shape (n, d).
            components: integer mixture component (or class, where each class is one component) of
                each sample, shape (n,). Without them one common mean is subtracted, and λ contains
                the spread of the component means.

        Returns:
            A model with one bin.

        Raises:
            ValueError: if the inputs are not a finite (n, d) matrix that varies within components,
                or the components are not n integers.
        """
        values = _as_matrix(inputs)
        n, d = values.shape
        ids = None if components is None else _as_components(components, n).to(values.device)
        labels = torch.zeros(n, dtype=torch.long, device=values.device) if ids is None else ids
        num_components = int(labels.max()) + 1
        if n <= num_components:
            raise ValueError(
                f"NoiseModel: {n} samples in {num_components} components leave no noise to "
                "measure; give more samples or fewer components"
            )
        centred = centre_within_components(values, labels, num_components)
        # Once more, because the mean of inputs far from zero is rounded like numbers of their size.
        centred = centre_within_components(centred, labels, num_components)
        variance = centred.square().sum(dtype=torch.float64) / ((n - num_components) * d)
        rounding = torch.finfo(values.dtype).eps
        if not float(variance) > rounding**2 * float(values.square().mean()):
            raise ValueError(
                "NoiseModel: the inputs do not vary within their components; decoupled descent "
                "needs noisy inputs"
            )
        return cls(
            eigenvalues=variance.to(values.dtype).reshape(1),
            multiplicities=torch.tensor([d], device=values.device),
            components=ids,
        )

    @property
    def dimension(self) -> int:
        """Input dimension d."""
        return int(self.multiplicities.sum())

    @property
    def mass(self) -> Tensor:
        """Noise mass τ_b = ν_b λ_b = E‖z‖² of each bin, shape (B,)."""
        return self.multiplicities * self.eigenvalues

    def to(self, device: torch.device, dtype: torch.dtype) -> "NoiseModel":
        """Return a copy with eigenvalues in ``dtype`` and every tensor on ``device``."""
        return NoiseModel(
            eigenvalues=self.eigenvalues.to(device, dtype),
            multiplicities=self.multiplicities.to(device),
            components=None if self.components is None else self.components.to(device),
        )


def _as_matrix(inputs: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(inputs).detach()
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(
            f"NoiseModel: expected inputs of shape (n, d), got {tuple(values.shape)}; "
            "flatten each sample to one row"
        )
    if values.dtype not in {torch.float32, torch.float64}:
        values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("NoiseModel: the inputs contain NaN or infinity; clean them first")
    return values


def _as_components(components: Tensor | np.ndarray, n: int) -> Tensor:
    ids = torch.as_tensor(components).detach()
    if ids.shape != (n,) or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"NoiseModel: expected {n} integer component ids, one a sample, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    return torch.unique(ids, return_inverse=True)[1]
