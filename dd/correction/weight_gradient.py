"""What the pending forwards have delivered, held against the weight's gradient."""

from dataclasses import replace

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients, joined
from dd.correction.gradient_check import (
    GradientComparison,
    edit_scale,
    edited,
    scale_of_terms,
)
from dd.correction.gradient_terms import ProjectedTerm
from dd.samples.several_rows import spread_over_units
from dd.support.fingerprint import Fingerprints

__all__ = ["gathered_gradients", "pending_gradients", "seen_terms", "weight_edit"]


def pending_gradients(attachment: Attachment) -> StepGradients:
    """The rows of all pending forwards, which must have their gradients.

    Raises:
        RuntimeError: if what is needed of them was changed in place.
    """
    count = attachment.samples.row_count
    assert count is not None
    attachment.shares = all(capture.is_intact for capture in attachment.pending)
    return joined(attachment.pending, count)


def gathered_gradients(attachment: Attachment, pushes: StepGradients) -> StepGradients:
    """The rows that are pushed of those whose shadows this rank keeps.

    Where rows share noise these are all of their units. Where ranks number samples alike, those of
    all: then a sample may come to any rank, and every rank keeps all shadows. Where each rank knows
    its own samples alone, it keeps theirs.

    Raises:
        RuntimeError: if ranks that do not number alike know the same samples.
    """
    units = None if attachment.noise is None else attachment.noise.units
    if units is not None:
        placement, gradient = spread_over_units(units, pushes.placement, pushes.by_sample)
        return replace(pushes, placement=placement, gradient=gradient)
    if attachment.ranks.size == 1:
        return pushes
    assert attachment.samples.known is not None
    if attachment.ranks_number_alike():
        return pushes.gathered(attachment.ranks, len(attachment.samples.known))
    _require_own_samples(attachment, attachment.samples.known)
    return pushes


def _require_own_samples(attachment: Attachment, known: Fingerprints) -> None:
    fresh = known.take_fresh()
    if attachment.ranks.largest(len(fresh), fresh.device) == 0:
        return
    ranks = fresh.new_full((len(fresh), 1), float(attachment.ranks.rank))
    everyone = attachment.ranks.gather(torch.cat([ranks, fresh], 1))
    others = everyone[everyone[:, 0] != attachment.ranks.rank, 1:]
    shared = int(known.find(others)[1].sum()) if len(others) else 0
    if attachment.ranks.largest(shared, fresh.device):
        raise RuntimeError(
            "DecoupledDescent: samples of one process came to another, away from their "
            "shadows. Construct with the same noise=dd.NoiseModel.fit(inputs) of all training "
            "samples on every process, after which any may get any sample; or give each "
            "process its own samples, and noise.of(rows)."
        )


def seen_terms(attachment: Attachment) -> list[ProjectedTerm]:
    """All terms of the weight's gradient, or none where one was not seen being made.

    Nor on several processes, which add their terms up: all must look at the same.
    """
    terms = [c.contribution for c in attachment.pending if c.contribution is not None]
    return terms if attachment.ranks.size == 1 and len(terms) == len(attachment.pending) else []


def weight_edit(attachment: Attachment, pushes: StepGradients) -> float | Tensor:
    """By which scale the weight's gradient was edited since the backward pass.

    Returns:
        The scale; a tensor of shape () on the device where it is not known yet.

    Raises:
        RuntimeError: if it was edited otherwise.
    """
    gradient, directions = attachment.layers.gradient, attachment.samples.directions
    assert gradient is not None
    assert directions is not None
    projections, terms = pushes.placement.fingerprints, seen_terms(attachment)
    compared = gradient, pushes.gradient, directions, projections, attachment.ranks
    if not attachment.verdicts.defers:
        if terms:
            return scale_of_terms(gradient, terms, directions)
        return edit_scale(*compared)
    if terms:
        found = GradientComparison.of_terms(gradient, terms, directions)
    else:
        found = GradientComparison.of(*compared, scaled=True)
    is_same, (scale, is_multiple) = found.is_same(), found.multiple
    attachment.verdicts.require(
        is_same | is_multiple, lambda _: RuntimeError(edited(attachment.ranks))
    )
    return torch.where(is_same, 1.0, scale)
