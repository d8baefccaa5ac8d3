"""Muon for matrices, and AdamW for what is none."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["muon"]


def muon(
    params: Iterable[Tensor], *, adamw: Mapping[str, Any], **settings: Any
) -> list[torch.optim.Optimizer]:
    """Return ``torch.optim.Muon`` of the matrices among the parameters, and AdamW of the rest.

    Args:
        params: of a model.
        adamw: settings of ``torch.optim.AdamW``.
        settings: those of ``torch.optim.Muon``.

    Raises:
        RuntimeError: if torch has no Muon.
        ValueError: if a setting is out of range.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch.optim.Muon came with torch 2.9, and this is {torch.__version__}: "
            "pip install 'torch>=2.9'"
        )
    parameters = list(params)
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, **settings), torch.optim.AdamW(rest, **adamw)]
