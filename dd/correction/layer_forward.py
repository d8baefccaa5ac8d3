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
from dd.correction.optimizer_state import FELL_BACK
from dd.correction.saved_state import bind_samples
from dd.curvature.choice import build, falls_back
from dd.curvature.estimators import Exact
from dd.functional import (
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
        ValueError: if the batch has not the shape of the noise model's inputs, or not its samples.
        RuntimeError: if its samples are not known.
    """
    _require_shape(attachment, inputs)
    if not attachment.pending:
        _settle_estimator(attachment, state)
    bind_samples(attachment, state, inputs.dtype)
    # Of several rows a sample a state does not hold all that there is to know of the noise.
    if attachment.noise is None and state.get("shadow_noise") is not None and inputs.dim() == 2:
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


def _require_shape(attachment: Attachment, inputs: Tensor) -> None:
    """Check that a batch has as many rows a sample as all else is made for.

    Raises:
        ValueError: if it has not, or something in use does not follow several rows a sample.
    """
    noise, shape, width = attachment.given_noise, tuple(inputs.shape), attachment.layer.in_features
    units = None if noise is None else noise.units
    if inputs.dim() not in {2, 3}:
        raise ValueError(
            f"DecoupledDescent: layer {attachment.name!r} must receive one row a sample, shape "
            f"(n, {width}), in training, or several of each, (n, rows, {width}); got {shape}"
        )
    of_samples = units is not None and units.are_samples
    if noise is not None and of_samples != (inputs.dim() == 3):
        fitted = f"(n, {units.places}, {width})" if of_samples and units else f"(n, {width})"
        raise ValueError(
            f"DecoupledDescent: layer {attachment.name!r} receives inputs of shape {shape} in "
            f"training, and the noise model was fitted on inputs of shape {fitted}. Fit it on "
            "what the layer receives, NoiseModel.fit(inputs, components): all rows of a sample "
            "are left out together."
        )
    if of_samples and units is not None and units.places != shape[1]:
        raise ValueError(
            f"DecoupledDescent: layer {attachment.name!r} receives samples of {shape[1]} rows, and "
            f"the noise model was fitted on samples of {units.places}; fill up each sample with "
            "rows of zeros to one number"
        )
    attachment.samples.require_rows(inputs)
    if inputs.dim() == 3 or units is not None:
        _refuse_what_follows_rows_alone(
            attachment,
            "rows that are left out together (inputs of shape (n, rows, d), or "
            "NoiseModel.fit(..., groups=))",
            {'curvature="exact"; use "probe" or "stein"': isinstance(attachment.estimator, Exact)},
        )
    if attachment.layers.are_several:
        _refuse_what_follows_rows_alone(
            attachment,
            "several layers on the same inputs",
            {"dd.decouple; use dd.DecoupledDescent": not attachment.shadows.follows_layers},
        )


def _refuse_what_follows_rows_alone(
    attachment: Attachment, what: str, more: dict[str, bool]
) -> None:
    """Refuse what follows neither units of several rows nor several layers.

    Raises:
        ValueError: if any of it is in use.
    """
    units = None if attachment.given_noise is None else attachment.given_noise.units
    of_groups = units is not None and not units.are_samples
    of_groups &= attachment.shadows.follows_layers and not attachment.layers.are_several
    in_use = more | {
        "head=True; use head=False, and a small head": attachment.shared is not None
        and not of_groups,
        'lr="auto"; use a number': attachment.searches,
        "damping below 1; use damping=1": attachment.bins is not None,
        "several processes; train in one": attachment.ranks.size > 1,
    }
    for other, is_used in in_use.items():
        if is_used:
            raise ValueError(f"DecoupledDescent: {what} are not followed yet with {other}")


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
    count = attachment.samples.row_count
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
    same = same_weight(attachment.layers.weight, attachment.samples.directions[0], expected)
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
        placement: the rows of its batch.
        inputs: shape (m, d), or (m, P, d) of samples of several rows.
        preactivation: R, one row a row of the inputs, shape (m, k) or (m · P, k).
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
        assert attachment.now is not None
        fit_noise(attachment, attachment.now, inputs)
    assert attachment.now is not None
    attachment.oversight.look(attachment.subject, attachment.now, inputs.detach().flatten(1))
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


def _settle_estimator(attachment: Attachment, state: dict[str, Any]) -> None:
    """Go by a probe from here on where Stein's lemma was found to fail and nobody asked for it."""
    if FELL_BACK in state and falls_back(attachment.estimator):
        attachment.curvature = "probe"
        attachment.estimator = build("probe", attachment.given_noise, attachment.module)


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
    now = attachment.along(attachment.layers.weight)
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
