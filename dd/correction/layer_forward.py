"""One training forward at the decoupled layer: whose rows they are, R, and what is kept of it."""

from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.correction.capture import Capture
from dd.correction.first_noise import fit_noise
from dd.correction.gradient_check import (
    same_weight,
    weight_changed,
)
from dd.correction.saved_state import bind_samples
from dd.functional import (
    at_least_single,
    correct_preactivation_,
    corrected_preactivation,
)
from dd.noise.model import NoiseModel
from dd.samples.placement import Placement
from dd.support.user_warning import warn_user

__all__ = ["begin", "corrected", "place"]


def place(
    attachment: Attachment, inputs: Tensor, state: dict[str, Any], *, binds: bool
) -> Placement | None:
    """Find the samples of a training batch; None before the first one with gradients.

    Raises:
        ValueError: if the batch is not a matrix, or not the samples of the noise model.
        RuntimeError: if its samples are not known.
    """
    if inputs.dim() != 2:
        raise ValueError(
            f"DecoupledDescent: layer {attachment.name!r} must receive one row a sample, shape "
            f"(n, {attachment.layer.in_features}), in training; got {tuple(inputs.shape)}"
        )
    bind_samples(attachment, state, inputs.dtype)
    if attachment.noise is None and state.get("shadow_noise") is not None:
        eigenvalues, multiplicities = state["shadow_noise"]
        attachment.noise = NoiseModel(eigenvalues, multiplicities)
    if not binds and state.get("shadow") is None:
        return None
    placement = attachment.samples.place(inputs, attachment.given_noise, binds=binds)
    known = None if attachment.given_noise is None else attachment.given_noise.num_samples
    if known is not None and known != attachment.samples.count:
        count = attachment.samples.count
        attachment.samples.forget()
        raise ValueError(
            f"DecoupledDescent: the noise model knows {known} training samples, but the first "
            f"training forward brought {count}, which are not among them as layer "
            f"{attachment.name!r} receives them. Fit the noise model on this layer's inputs, feed "
            "all samples, or use optimizer.track(loader)."
        )
    return placement


def corrected(
    attachment: Attachment, placement: Placement | None, output: Tensor, state: dict[str, Any]
) -> Tensor:
    """Return R, shape (m, k).

    Raises:
        RuntimeError: if the weight was changed since the last step.
    """
    if placement is None or state.get("shadow") is None:
        return output
    _require_same_weights(attachment, state.get("shadow_weight"))
    count = attachment.samples.count
    with torch.no_grad():
        if count is not None and attachment.noise is not None:
            attachment.shadows.make(state, attachment.noise, count, output)
        shadow = attachment.shadows.of(state, placement)
    alone = _is_alone_with(attachment, output)
    correct = correct_preactivation_ if alone else corrected_preactivation
    found = correct(output, shadow)
    if attachment.shared is None:
        attachment.oversight.look_at_shadows(attachment.subject, shadow.sum(0), found)
    return found


def _is_alone_with(attachment: Attachment, output: Tensor) -> bool:
    """Whether nobody but the layer's own product has seen its output yet."""
    return (
        attachment.is_plain
        and output.requires_grad
        and not nn.modules.module._global_forward_hooks
        and type(output) is Tensor
        and not output._is_view()
    )


def _require_same_weights(attachment: Attachment, expected: Tensor | None) -> None:
    if expected is None or attachment.samples.directions is None:
        return
    same = same_weight(attachment.layer.weight.detach(), attachment.samples.directions[0], expected)
    message = weight_changed("the decoupled layer's weight")
    attachment.verdicts.require(same, lambda _: RuntimeError(message))


def begin(
    attachment: Attachment,
    placement: Placement,
    inputs: Tensor,
    preactivation: Tensor,
    seed: int,
    *,
    has_shadow: bool,
    product: Any = None,
) -> Tensor:
    """Begin a training forward and return what the following layers receive.

    Args:
        attachment: of the layer.
        placement: the samples of its batch.
        inputs: shape (m, d).
        preactivation: R, shape (m, k).
        seed: of the curvature's probe.
        has_shadow: whether the state holds shadows.
        product: node of XW in the autograd graph, where it is known.

    Raises:
        RuntimeError: if the layer is used twice in a forward, or something trainable comes
            before it.
    """
    _require_single(attachment, placement)
    if not preactivation.requires_grad:
        raise RuntimeError(
            f"DecoupledDescent: the weight of layer {attachment.name!r} was frozen after "
            "attaching; unfreeze it, or call optimizer.detach() to train the other layers alone"
        )
    if inputs.requires_grad:
        raise RuntimeError(
            f"DecoupledDescent: the input of layer {attachment.name!r} depends on trainable "
            f"parameters ({_earlier_parameters(attachment)}). The decoupled layer must come "
            "first: freeze what is before it (requires_grad_(False)), or name "
            "another layer with layer=."
        )
    if attachment.orphans and not has_shadow:
        _warn_of_orphans(attachment)
    if attachment.noise is None or attachment.noise is attachment.given_noise:
        fit_noise(attachment, placement, inputs)
    attachment.oversight.look(attachment.subject, placement, inputs.detach())
    if attachment.estimator.records and (
        preactivation._backward_hooks or preactivation.retains_grad
    ):
        # What is at R itself sees gradients whenever one ends there, and is to see them once.
        preactivation = preactivation.clone()
    capture = Capture(
        placement,
        preactivation,
        attachment.estimator,
        seed,
        shares=attachment.shares,
        product=product,
        directions=attachment.samples.directions,
    )
    attachment.pending.append(capture)
    outgoing = capture.outgoing(preactivation)
    return attachment.oversight.outgoing(attachment.subject, capture, outgoing, seed)


def _require_single(attachment: Attachment, placement: Placement) -> None:
    for other in attachment.pending:
        if other.gradient is not None or not _share_samples(placement, other.placement):
            continue
        raise RuntimeError(
            f"DecoupledDescent: layer {attachment.name!r} saw two training forwards of the same "
            "samples before a backward (or is used twice in one forward, which is outside the "
            "theory). Run forwards that lead to no step under model.eval() or "
            "torch.no_grad(); after a skipped or interrupted step call "
            "optimizer.drop_forward()."
        )


def _earlier_parameters(attachment: Attachment) -> str:
    names = []
    for name, parameter in attachment.module.named_parameters():
        if parameter is attachment.layer.weight:
            break
        if parameter.requires_grad:
            names.append(name)
    return ", ".join(names[:4]) or "or requires a gradient itself"


def _warn_of_orphans(attachment: Attachment) -> None:
    """Say so where the weights come from steps whose shadows are gone."""
    assert attachment.samples.directions is not None
    direction = attachment.samples.directions[0]
    weight = at_least_single(attachment.layer.weight.detach())
    now = weight @ direction.to(weight)
    if any(torch.equal(left.to(now), now) for left in attachment.orphans):
        warn_user(
            f"DecoupledDescent: layer {attachment.name!r} was trained by another optimizer, "
            "which has kept its shadows, so that they start at zero: the training error is too "
            "low at first. Load that optimizer's state_dict() to go on from it, or begin again "
            "from the weights of its start.",
            UserWarning,
        )
    attachment.orphans = []


def _share_samples(one: Placement, other: Placement) -> bool:
    if one.rows_on_cpu is None or other.rows_on_cpu is None:
        return True
    return bool(torch.isin(one.rows_on_cpu, other.rows_on_cpu).any())
