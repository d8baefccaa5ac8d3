"""The noise model of a first training batch, and that all processes have the same."""

import math

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.noise.by_default import fitted_by_default
from dd.noise.model import NoiseModel
from dd.samples.placement import Placement

__all__ = ["fit_noise"]


def fit_noise(attachment: Attachment, placement: Placement, inputs: Tensor) -> None:
    """Fit the noise model where none was given, and settle it between processes.

    Args:
        attachment: of the layer.
        placement: of the first training batch.
        inputs: of that batch, shape (m, d).

    Raises:
        ValueError: if the batch does not show the noise, or processes have different models.
    """
    noise = attachment.given_noise
    if noise is None:
        inputs = attachment.ranks.gather(_all_inputs(attachment, placement, inputs.detach()))
        noise = fitted_by_default(inputs, attachment.bins)
    dtype = torch.promote_types(attachment.layer.weight.dtype, torch.float32)
    attachment.noise = noise.to(attachment.layer.weight.device, dtype)
    if attachment.ranks.size > 1:
        _settle_ranks(attachment, attachment.noise)


def _settle_ranks(attachment: Attachment, noise: NoiseModel) -> None:
    """Make sure that all ranks correct alike.

    Raises:
        ValueError: if their noise models differ.
    """
    bins = len(noise.eigenvalues)
    if attachment.ranks.largest(bins, noise.mass.device) != bins or not attachment.ranks.agree(
        torch.cat([noise.eigenvalues, noise.mass])
    ):
        raise ValueError(
            "DecoupledDescent: the processes have different noise models. Fit one on all "
            "training samples in every process, and give each noise.of(rows), the rows it "
            "trains on."
        )
    count = attachment.ranks.largest(attachment.estimator.num_components, noise.mass.device)
    attachment.estimator.num_components = count


def _all_inputs(attachment: Attachment, placement: Placement, inputs: Tensor) -> Tensor:
    """Inputs of all samples in their order.

    Raises:
        ValueError: if the batch does not hold all.
    """
    whole = not math.isinf(attachment.samples.total(None))
    if whole and (placement.rows is None or placement.index is None):
        return inputs
    if whole and placement.rows is not None and len(placement.rows) == attachment.samples.count:
        ordered = torch.empty_like(inputs[: len(placement.rows)])
        ordered[placement.index] = inputs
        return ordered
    attachment.samples.release()
    raise ValueError(
        "DecoupledDescent: a mini-batch does not show the noise of the training set. "
        "Construct with noise=dd.NoiseModel.fit(inputs, components), the inputs of all "
        "training samples as the decoupled layer receives them; components are optional."
    )
