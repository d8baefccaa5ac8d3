"""Inputs and component ids as users give them, checked."""

import numpy as np
import torch
from torch import Tensor


def _check_bins(eigenvalues: Tensor, multiplicities: Tensor) -> None:
    if eigenvalues.dim() != 1 or eigenvalues.shape != multiplicities.shape:
        raise ValueError(
            "NoiseModel: expected eigenvalues and multiplicities of one shape (bins,), got "
            f"{tuple(eigenvalues.shape)} and {tuple(multiplicities.shape)}"
        )
    if not bool(torch.isfinite(eigenvalues).all() and (eigenvalues >= 0).all()):
        raise ValueError(
            f"NoiseModel: eigenvalues must be finite and not negative, got {eigenvalues}; "
            "clip rounding errors at 0"
        )


def _check_relative_mass(relative_mass: Tensor, components: Tensor | None) -> None:
    if relative_mass.dim() != 1 or (
        components is not None and len(components) != len(relative_mass)
    ):
        raise ValueError(
            "NoiseModel: expected one relative mass a sample, shape (n,), got "
            f"{tuple(relative_mass.shape)}"
            + ("" if components is None else f" for {len(components)} component ids")
        )
    if not bool((torch.isfinite(relative_mass) & (relative_mass >= 0)).all()):
        raise ValueError("NoiseModel: relative masses must be finite and not negative")


def _as_matrix(inputs: Tensor | np.ndarray) -> Tensor | np.ndarray:
    values = inputs if isinstance(inputs, np.ndarray) else torch.as_tensor(inputs).detach()
    if len(values.shape) != 2 or 0 in values.shape:
        raise ValueError(
            f"NoiseModel: expected inputs of shape (n, d), got {tuple(values.shape)}; "
            "flatten each sample to one row"
        )
    return values


def _as_components(components: Tensor | np.ndarray, n: int) -> Tensor:
    ids = torch.as_tensor(components).detach()
    if ids.shape != (n,) or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"NoiseModel: expected {n} integer component ids, one a sample, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    return torch.unique(ids, return_inverse=True)[1]
