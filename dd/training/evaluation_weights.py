"""Optimizers that train at other weights than those that they hand over, as Schedule-Free does."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dd.training.joint_optimizer import JointOptimizer

__all__ = ["evaluation_weights", "to_training_weights"]


@contextmanager
def evaluation_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, stay: bool
) -> Iterator[None]:
    """Put the weights in place that are handed over, for the time of a look at them.

    Args:
        model: in training.
        optimizer: any; of most the weights are the same all the time.
        stay: whether they stay, as there are no more updates.
    """
    switches = _switches(optimizer)
    if not switches:
        yield
        return
    # To and fro rounds, and a look would change what is trained.
    kept = None if stay else copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for part in switches:
        part.eval()
    yield
    if kept is not None:
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])


def to_training_weights(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights in place that updates are made at, where they are not."""
    for part in _switches(optimizer):
        part.train()


def _switches(optimizer: torch.optim.Optimizer) -> list[Any]:
    parts = optimizer.optimizers if isinstance(optimizer, JointOptimizer) else (optimizer,)
    return [part for part in parts if hasattr(part, "train") and hasattr(part, "eval")]
