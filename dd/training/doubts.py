"""Which optimizers say of their own training error that it is not to be believed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dd.optimizer import DecoupledDescent

__all__ = ["MARK", "closely", "doubts_of", "mark"]

MARK = "not to be believed"


def doubts_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Why an optimizer's training error is not to be believed as that of a corrected one."""
    if not isinstance(optimizer, DecoupledDescent) or optimizer._attachment is None:
        return ()
    return optimizer._attachment.oversight.doubts


@contextmanager
def closely(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have every forward looked at, on an accelerator too: what is measured there is waited for."""
    if not isinstance(optimizer, DecoupledDescent) or optimizer._attachment is None:
        yield
        return
    with optimizer._attachment.oversight.closely():
        yield


def mark(figures: Mapping[str, Any]) -> str:
    """Return the mark of an optimizer's figures, empty where nothing speaks against them.

    Args:
        figures: of ``summary.json``.
    """
    if not figures.get("doubts"):
        return ""
    trials = figures.get("per_trial", ())
    if not trials:
        return MARK
    doubted = sum(bool(own.get("doubts")) for own in trials)
    return f"{MARK} in {doubted} of {len(trials)} trials"
