"""More probes of the curvature at the state of a step, from further calls of its closure."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.curvature.estimators import Probe, Rows
from dd.rules.line_search.product_cache import FirstForward
from dd.rules.line_search.replay import UNLIKE_FIRST, ClosureReplay, forward_replaced

__all__ = ["refined"]

# Up to this many units each is probed by itself, and H is exact; of more there are as many probes.
MOST_UNITS = 32


def refined(
    attachment: Attachment, first: FirstForward, closure: Callable[[], Any], rewind: ClosureReplay
) -> Callable[[Tensor], Tensor]:
    """Estimate H better than by one probe, from further calls of the closure.

    A search lowers the training loss by what the noise of a probe leaves in the shadows, and has
    many steps to find it: where units are few H is exact, but for what kinks add to it and for
    samples that depend on each other, as in a batch normalisation.

    Args:
        attachment: with the first forward of the step pending.
        first: that forward's XW.
        closure: of the step.
        rewind: around every call of it.

    Raises:
        FloatingPointError: if the second derivative is not finite.

    Returns:
        What makes the step's own estimate of H, shape (k, k), a better one; the same where the
        estimator draws no probes.
    """
    estimator, width = attachment.estimator, attachment.layer.out_features
    if not isinstance(estimator, Probe):
        return lambda own: own
    few = width <= MOST_UNITS
    found: list[Tensor] = []
    kinks: Tensor | None = None
    with _aside(attachment), torch.enable_grad():
        for number in range(width if few else MOST_UNITS):
            attachment.repeats = number + 1
            with ExitStack() as stack:
                stack.enter_context(rewind.call())
                stack.enter_context(forward_replaced(attachment.layer, first.again))
                if few:
                    stack.enter_context(estimator.along(number))
                closure()
            rows = _rows(attachment)
            with torch.no_grad():
                if few:
                    found.append(estimator.column(rows))
                    kinks = estimator.kinks(rows) if number == 0 else kinks
                else:
                    found.append(estimator.solve(estimator.moments(rows)))
            attachment.drop()
    total = torch.stack(found)
    if not bool(total.isfinite().all()):
        raise FloatingPointError(
            "DecoupledDescent: the second derivative of the loss is not finite; nothing was "
            "updated. Likely causes: half precision, or a loss that is not smooth at its argument."
        )
    if not few:
        return lambda own: torch.cat([own[None], total]).mean(0)
    exact = (total + total.mT) / 2
    if kinks is not None:
        exact = exact + torch.diag(kinks).to(exact)
    return lambda own: exact.to(own)


@contextmanager
def _aside(attachment: Attachment) -> Iterator[None]:
    """Put what is pending aside for a while."""
    pending, attachment.pending = attachment.pending, []
    try:
        yield
    finally:
        attachment.drop()
        attachment.pending, attachment.repeats = pending, 0


def _rows(attachment: Attachment) -> Rows:
    """The rows of the pending forward.

    Raises:
        RuntimeError: if there is not one, of all samples.
    """
    pending = attachment.pending
    if len(pending) != 1 or pending[0].gradient is None or pending[0].placement.index is not None:
        raise RuntimeError(UNLIKE_FIRST)
    (capture,) = pending
    return Rows(
        capture.observed,
        capture.product(),
        None,
        attachment.ranks,
        capture.preactivation,
        capture.gradient,
    )
