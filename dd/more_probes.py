"""More probes of the curvature at the state of a step, from further calls of its closure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dd.attachment import Attachment
from dd.curvature import Rows
from dd.product_cache import FirstForward
from dd.replay import UNLIKE_FIRST, Rewind, forward_replaced

__all__ = ["probed_again"]


def probed_again(
    attachment: Attachment,
    first: FirstForward,
    closure: Callable[[], Any],
    rewind: Rewind,
    count: int,
) -> list[Tensor]:
    """Estimate H again and again, each time with a probe of its own; nothing else changes.

    A search lowers the training loss by what the noise of one probe leaves in the shadows, so that
    the noise must be small beside that of the samples.

    Args:
        attachment: with the first forward of the step pending.
        first: that forward's XW.
        closure: of the step.
        rewind: around every call of it.
        count: of estimates.

    Returns:
        The estimates of H, each (k, k); none where the estimator draws no probes.
    """
    if not attachment.estimator.draws:
        return []
    found = []
    with _aside(attachment), torch.enable_grad():
        for number in range(1, count + 1):
            attachment.repeats = number
            with rewind.call(), forward_replaced(attachment.layer, first.again):
                closure()
            found.append(_estimate(attachment))
            attachment.drop()
    return found


@contextmanager
def _aside(attachment: Attachment) -> Iterator[None]:
    """Put what is pending aside for a while."""
    pending, attachment.pending = attachment.pending, []
    try:
        yield
    finally:
        attachment.drop()
        attachment.pending, attachment.repeats = pending, 0


@torch.no_grad()
def _estimate(attachment: Attachment) -> Tensor:
    """The estimate of the pending forward.

    Raises:
        RuntimeError: if there is not one, of all samples.
    """
    pending = attachment.pending
    if len(pending) != 1 or pending[0].gradient is None or pending[0].placement.index is not None:
        raise RuntimeError(UNLIKE_FIRST)
    (capture,) = pending
    estimator = attachment.estimator
    rows = Rows(
        capture.observed,
        capture.product(),
        None,
        attachment.ranks,
        capture.preactivation,
        capture.gradient,
    )
    return estimator.solve(estimator.moments(rows))
