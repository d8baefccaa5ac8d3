"""Muon for hidden layers, and AdamW for the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["muon"]


def muon(
    params: Iterable[Tensor], *, adamw: Mapping[str, Any], **settings: Any
) -> list[torch.optim.Optimizer]:
    """Return ``torch.optim.Muon`` of the matrices but the last one, and AdamW of the rest.

    The last layer is AdamW's, as Muon's authors have it: its scores want steps of their own size.

    Args:
        params: of a model, in the order of its layers.
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
    *hidden, _ = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if not any(p is each for each in hidden)]
    return [torch.optim.Muon(hidden, **settings), torch.optim.AdamW(rest, **adamw)]
