"""Which optimizers say of their own training error that it is not to be believed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dd.training.joint_optimizer import tracker_of

__all__ = ["closely", "doubts_of"]


def doubts_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Why an optimizer's training error is not to be believed as that of a corrected one."""
    tracker = tracker_of(optimizer)
    if tracker is None or tracker._attachment is None:
        return ()
    return tracker._attachment.oversight.doubts


@contextmanager
def closely(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have every forward looked at, on an accelerator too: what is measured there is waited for."""
    tracker = tracker_of(optimizer)
    if tracker is None or tracker._attachment is None:
        yield
        return
    with tracker._attachment.oversight.closely():
        yield
