"""Pre-activations of fresh samples along a training run, in the coordinates of its weights.

In the limit of state evolution the decoupled weights stay in the span of their start, the component
means and one Gaussian matrix a step, ζ^t, whose inner products are those of the gradients:
(ζ^s)ᵀ ζ^t = (τ/n) E[g^s (g^t)ᵀ]. Let e_1, e_2, … be an orthonormal basis of the gradients as
functions of a fresh sample, g^t = Σ_j e_j c_j^t. Then the ζ^t have the coordinates √(τ/n) c^t along
as many orthonormal directions of the input space, and a fresh sample's noise has independent
standard normal coordinates along them, times √λ. Here e_j is a column over the sampled paths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dd.theory.mixture import GaussianMixture

__all__ = ["FreshPaths", "Start"]

# Innovations of a gradient below this share of its length are rounding errors.
_NEGLIGIBLE = 1e-4


@dataclass(frozen=True, eq=False)
class Start:
    """Initial weights and component means in common orthonormal coordinates, one set a bin.

    Attributes:
        weight: shape (s, k).
        means: shape (A, s).
        variance: λ of each coordinate, shape (s,).
    """

    weight: Tensor
    means: Tensor
    variance: Tensor

    @classmethod
    def measured(cls, weight: Tensor, mixture: GaussianMixture) -> "Start":
        """Reduce to inner products.

        Args:
            weight: W⁰, shape (d, k).
            mixture: gives the means and the bins.
        """
        width, count = weight.shape[1], len(mixture.means)
        both = torch.cat([weight.double().cpu(), mixture.means.double().cpu().T], 1)
        parts = [
            torch.linalg.qr(part, mode="r").R.reshape(-1, width + count)
            for part in both.split(mixture.multiplicities)
        ]
        rows = torch.cat(parts)
        variance = mixture.eigenvalues.repeat_interleave(torch.tensor([len(p) for p in parts]))
        return cls(rows[:, :width], rows[:, width:].T, variance)


class FreshPaths:
    """N fresh samples, their components fixed, seen at every step of a training run.

    Args:
        start: of the weights.
        eigenvalues: λ, shape (B,).
        noise_per_sample: τ_b/n of each bin, shape (B,).
        components: of each path, shape (N,), on the paths' device.
        width: k.
        steps: number of gradients to come at most.
        dtype: of the paths.
        generator: on the paths' device.

    Attributes:
        weight: coordinates of the decoupled weights, shape (rows, k); what is trained.
    """

    def __init__(
        self,
        start: Start,
        eigenvalues: Tensor,
        noise_per_sample: Tensor,
        components: Tensor,
        *,
        width: int,
        steps: int,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        device, count = components.device, len(components)
        self._components, self._generator = components, generator
        self._means = start.means.to(device, dtype)
        self._eigenvalues = eigenvalues.to(device, dtype)
        self._push = noise_per_sample.sqrt().to(device, dtype)
        bins, static = len(eigenvalues), len(start.weight)
        most = static + bins * min(steps * width, count)
        self.weight = torch.zeros(most, width, dtype=dtype, device=device)
        self.weight[:static] = start.weight.to(device, dtype)
        self._variance = self._eigenvalues.repeat(-(-most // bins))
        self._variance = torch.cat([start.variance.to(device, dtype), self._variance])[:most]
        self._static = self._rows = static
        self._noise = _Columns(self._draw(static))
        self._basis = _Columns(components.new_empty(count, 0, dtype=dtype))

    def preactivation(self) -> Tensor:
        """R, shape (N, k)."""
        weight = self.weight[: self._rows]
        scaled = self._variance[: self._rows, None].sqrt() * weight
        return torch.addmm(self.overlaps()[self._components], self._noise.filled, scaled)

    def overlaps(self) -> Tensor:
        """M, means of the pre-activation of each component, shape (A, k)."""
        return self._means @ self.weight[: self._static]

    def covariance(self) -> Tensor:
        """K, covariance of the pre-activation within components, shape (k, k)."""
        weight = self.weight[: self._rows]
        return weight.T @ (self._variance[: self._rows, None] * weight)

    def gradient(self, mean_gradients: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Gradient that moves the weights, shape (rows, k): signal, drift and noise.

        Args:
            mean_gradients: p_a E_a[g], shape (A, k).
            gradient: rows g_j √w_j, w_j the share of path j in an expectation, shape (N, k).
            curvature: H̄, shape (k, k); times ρ where the drift is damped.
        """
        innovations = self._innovations(gradient)
        found = self._variance[:, None] * (self.weight @ curvature)
        found[: self._static] += self._means.T @ mean_gradients
        noise = self._push[None, :, None] * innovations[:, None, :]
        found[self._static : self._rows] += noise.flatten(0, 1)
        return found

    def _innovations(self, gradient: Tensor) -> Tensor:
        """Coordinates c of a gradient along e_1, e_2, …, shape (r, k); e is extended to hold it."""
        basis = self._basis.filled
        known = basis.T @ gradient
        rest = gradient - basis @ known
        # Once more, so that rounding leaves nothing along the basis.
        again = basis.T @ rest
        rest = rest - basis @ again
        variance, axes = torch.linalg.eigh((rest.T @ rest).double())
        length = float(gradient.double().square().sum())
        room = len(gradient) - basis.shape[1]
        keep = (variance > _NEGLIGIBLE**2 * length).nonzero().flatten()[-room:] if room else []
        if len(keep) == 0:
            return known + again
        axes = axes[:, keep].to(rest)
        scale = variance[keep].sqrt().to(rest)
        self._basis.append(rest @ (axes / scale))
        self._noise.append(self._draw(len(keep) * len(self._eigenvalues)))
        self._rows += len(keep) * len(self._eigenvalues)
        return torch.cat([known + again, scale[:, None] * axes.T])

    def _draw(self, columns: int) -> Tensor:
        like = self._means
        return torch.randn(
            len(self._components),
            columns,
            generator=self._generator,
            dtype=like.dtype,
            device=like.device,
        )


class _Columns:
    """A matrix to which columns are appended, without a copy of the old ones each time."""

    def __init__(self, filled: Tensor) -> None:
        self._storage, self._count = filled.T.contiguous(), filled.shape[1]

    @property
    def filled(self) -> Tensor:
        return self._storage[: self._count].T

    def append(self, columns: Tensor) -> None:
        more = self._count + columns.shape[1]
        if more > len(self._storage):
            grown = self._storage.new_empty(max(more, 2 * len(self._storage)), len(columns))
            grown[: self._count] = self._storage[: self._count]
            self._storage = grown
        self._storage[self._count : more] = columns.T
        self._count = more
