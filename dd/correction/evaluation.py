"""The corrected loss over batches of training samples, outside of training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.estimate import Estimate, check_confidence
from dd.correction.repeats import GroupSums, Repeats
from dd.support.modes import modes_kept

__all__ = [
    "corrected_estimate",
    "corrected_in_eval_mode",
    "corrected_mean",
    "corrected_outputs",
]


def corrected_mean(
    attachment: Attachment, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> Tensor:
    """Mean over all samples of what ``loss`` returns for a batch, over all ranks.

    Raises:
        ValueError: if there are no batches.
        RuntimeError: if a batch did not pass through the decoupled layer.
    """
    total, rows = torch.zeros(()), 0
    for value, count in _values(attachment, batches, loss, "evaluate()"):
        total, rows = total + count * value, rows + count
    ranks = attachment.ranks
    return ranks.sum(total) / ranks.sum(torch.as_tensor(float(rows), device=total.device))


def corrected_estimate(
    attachment: Attachment,
    batches: Iterable[Any],
    losses: Callable[[Any], Tensor],
    confidence: float,
) -> Estimate:
    """Mean over all samples of what ``losses`` returns for each, with its interval.

    A sample that comes several times weighs so in the mean, and counts once for the interval, as do
    all rows of a group.

    Raises:
        ValueError: if there are not at least two samples, ``losses`` does not return a row a
            sample, or the confidence is out of range.
        RuntimeError: if a batch did not pass through the decoupled layer.
    """
    check_confidence(confidence)
    repeats, groups = Repeats(attachment), GroupSums.of(attachment)
    total, squares, rows = torch.zeros(()), torch.zeros(()), 0
    for values, count in _values(attachment, batches, losses, "estimate()"):
        if values.ndim not in (1, 2) or len(values) != count:
            raise ValueError(
                f"DecoupledDescent: estimate() needs the loss of each of {count} samples, shape "
                f'({count},) or ({count}, j), got {tuple(values.shape)}; use reduction="none"'
            )
        values = values.double()
        total, squares = total + values.sum(0), squares + values.square().sum(0)
        rows += count
        repeats.see(count)
        if groups is not None:
            groups.see(values)
    ranks = attachment.ranks
    total, squares = ranks.sum(total), ranks.sum(squares)
    num_rows = int(ranks.sum(torch.as_tensor(float(rows), device=total.device)))
    effective: float | Tensor
    if groups is None:
        num_samples, effective = repeats.numbers()
    else:
        num_samples, effective = groups.numbers(total, squares, num_rows)
    if num_samples < 2:
        what = "samples" if groups is None else "groups"
        raise ValueError(f"DecoupledDescent: estimate() needs two {what} or more, got one")
    # One sample that came nearly always leaves next to none.
    effective = torch.as_tensor(effective, device=total.device).clamp_min(1.5)
    found = Estimate.of_sums(
        total, squares, num_rows, confidence, num_samples=num_samples, effective=effective
    )
    return replace(found, doubts=attachment.oversight.doubts)


def corrected_outputs(attachment: Attachment, batches: Iterable[Any]) -> Tensor:
    """What the model returns for training samples, corrected, in the order of the batches.

    Raises:
        ValueError: if there are no batches.
        RuntimeError: if a batch did not pass through the decoupled layer.
        TypeError: if the model returns something else than a tensor.
    """

    def outputs(batch: Any) -> Tensor:
        found = attachment.module(batch if isinstance(batch, Tensor) else batch[0])
        if not isinstance(found, Tensor):
            raise TypeError(
                "DecoupledDescent: predict() needs a model that returns a tensor, got "
                f"{type(found).__name__}; use estimate() with a function of your own"
            )
        # A marked tensor is of no use outside.
        return found.detach().as_subclass(Tensor)

    return torch.cat([v for v, _ in _values(attachment, batches, outputs, "predict()")])


@contextmanager
def corrected_in_eval_mode(attachment: Attachment) -> Iterator[None]:
    """Put the model in eval mode, but for the correction."""
    shared = attachment.shared
    layers = [*attachment.layers.layers, *([] if shared is None else [shared.head])]
    with modes_kept(attachment.module):
        attachment.module.eval()
        for layer in layers:
            # Not train(): parametrised children keep their mode.
            layer.training = True
        yield


def _values(
    attachment: Attachment, batches: Iterable[Any], loss: Callable[[Any], Tensor], what: str
) -> Iterator[tuple[Tensor, int]]:
    """What the loss says of every batch, and the batch's number of samples.

    Raises:
        ValueError: if there are no batches.
        RuntimeError: if a batch did not pass through the decoupled layer.
    """
    rows = 0
    closely = attachment.oversight.closely()
    with corrected_in_eval_mode(attachment), attachment.samples.apart(), closely:
        for batch in batches:
            attachment.rows_seen = 0
            value = loss(batch)
            if attachment.rows_seen == 0:
                raise RuntimeError(
                    f"DecoupledDescent: a batch did not pass through layer {attachment.name!r} in "
                    f"{what}; let loss(batch) run the model"
                )
            rows += attachment.rows_seen
            yield value.detach(), attachment.rows_seen
    if rows == 0:
        raise ValueError(f"DecoupledDescent: {what} got no batches")
