"""Inputs and component ids as users give them, checked."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dd.noise.centred import native

NUMBERED = "numpy.unique(labels, return_inverse=True)[1] numbers labels of any kind"


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
    values = inputs if isinstance(inputs, np.ndarray) else _as_tensor("inputs", inputs)
    if isinstance(values, np.ndarray) and values.dtype.kind not in "fiub":
        raise ValueError(f"NoiseModel: inputs must be real numbers, got data type {values.dtype}")
    if isinstance(values, Tensor) and values.is_complex():
        raise ValueError(f"NoiseModel: inputs must be real numbers, got data type {values.dtype}")
    if isinstance(values, Tensor) and values.layout != torch.strided:
        raise ValueError(
            f"NoiseModel: inputs must be dense, got {values.layout}; use inputs.to_dense()"
        )
    if len(values.shape) != 2 or 0 in values.shape:
        raise ValueError(
            f"NoiseModel: expected inputs of shape (n, d), got {tuple(values.shape)}; "
            "flatten each sample to one row, or, of several rows a sample, NoiseModel.fit takes "
            "(n, rows, d)"
        )
    return values


def _as_components(components: Tensor | np.ndarray, n: int) -> Tensor:
    ids = _as_tensor("components", components)
    if ids.shape != (n,) or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"NoiseModel: expected {n} integer component ids, one a sample, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}; {NUMBERED}"
        )
    return torch.unique(ids, return_inverse=True)[1]


def _as_tensor(what: str, values: Any) -> Tensor:
    """Return a tensor, of numpy's arrays and Python's lists too.

    Raises:
        ValueError: if they hold no numbers.
    """
    try:
        if isinstance(values, np.ndarray):
            values = native(values)
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(values, "dtype", type(values).__name__)
        remedy = NUMBERED if what == "components" else "a table's are table.to_numpy(dtype=float)"
        raise ValueError(
            f"NoiseModel: {what} must be a tensor or array of numbers, got {kind}; {remedy}"
        ) from error
