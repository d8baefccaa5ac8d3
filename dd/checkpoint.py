"""The last good state of every optimizer of a trial, in one file."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dd.tracking import replacing

__all__ = ["Checkpoint"]


class Checkpoint:
    """Keeps ``checkpoint.pt``, which ``torch.load(path, weights_only=True)`` reads.

    The file maps ``"trial"`` to the trial and ``"optimizers"`` to the step, the model's and the
    optimizer's state of each optimizer by name.

    Args:
        path: of the file; it is always a whole one.
        trial: which repetition the states belong to.
    """

    def __init__(self, path: Path, trial: int) -> None:
        self.path = path
        self._content: dict[str, Any] = {"trial": trial, "optimizers": {}}

    def keep(
        self, name: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Replace the state of one optimizer and write the file."""
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self._content["optimizers"][name] = copy.deepcopy(state)
        with replacing(self.path) as scratch:
            torch.save(self._content, scratch)
