"""How all shadows move in one step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients
from dd.correction.head_form import leave_head
from dd.correction.optimizer_state import FELL_BACK, OptimizerState
from dd.correction.shadows import (
    Shadows,
    ShadowSlice,
    ShadowTerms,
    ShadowUpdate,
    momentum_writer,
)
from dd.correction.step_curvature import step_curvature
from dd.correction.weight_gradient import (
    gathered_gradients,
    pending_gradients,
    seen_terms,
    weight_edit,
)
from dd.curvature.choice import falls_back
from dd.functional import all_finite, damped_weight_gradient
from dd.functional.arithmetic import stored_numbers
from dd.noise.units import Units
from dd.watch.step_watches import StepWatches

__all__ = ["ShadowStep", "StepMeasures"]


@dataclass(frozen=True, eq=False)
class StepMeasures:
    """What the pending forwards tell of a step.

    Attributes:
        pushes: the rows whose shadows this process keeps.
        scale: of the step's gradient over that of the backward pass, on the mean of all processes.
        curvature: H, shape (k, k).
        shared: H_ψ, shape (p, p), or None where the head is not corrected.
        own: the rows that push what all samples share: of rows that are left out together, those
            of the batch.
    """

    pushes: StepGradients
    scale: float | Tensor
    curvature: Tensor
    shared: Tensor | None
    own: StepGradients


class ShadowStep:
    """One step of an attached optimizer, before anything has moved.

    Args:
        attachment: with the pending training forwards.
        store: the optimizer's state.
        watches: see the steps on all samples.
        damping: ρ.
        better: makes the step's own estimate of H, shape (k, k), a better one.

    Attributes:
        layer_curvature: H, shape (k, k), as found by :meth:`updates`.
    """

    layer_curvature: Tensor

    def __init__(
        self,
        attachment: Attachment,
        store: OptimizerState,
        watches: StepWatches,
        damping: float,
        better: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._attachment, self._store = attachment, store
        self._watches, self._damping = watches, damping
        self._better = better

    def updates(self) -> list[ShadowUpdate]:
        """What is to be stepped beside the parameters; consumes the pending forwards.

        Raises:
            RuntimeError: if forward and backward are missing, the gradients are not those that they
                delivered, or the curvature cannot be had.
            FloatingPointError: if a gradient is not finite.
        """
        attachment = self._attachment
        if not attachment.pending:
            self.require_idle()
            return self._idle()
        found = self.measure(weight_edit)
        shared = found.shared
        updates = [
            self._of_layer(found),
            *([] if shared is None else self._of_shared(found.own, found.scale, shared)),
        ]
        self.finish()
        return updates

    def measure(self, edit: Callable[[Attachment, StepGradients], float | Tensor]) -> StepMeasures:
        """What the pending forwards tell of the step that is due.

        Args:
            edit: returns by which scale the weight's gradient was edited since its backward pass.

        Raises:
            RuntimeError: as :meth:`updates`, or whatever ``edit`` raises.
            FloatingPointError: if a gradient is not finite.
        """
        attachment = self._attachment
        self.require_delivered()
        self._check_finite()
        pushes = pending_gradients(attachment)
        edited = edit(attachment, pushes)
        # A data-parallel loss is the mean of the ranks' losses.
        scale = edited / attachment.ranks.size
        # First, as a head that cannot be followed leaves another noise model behind.
        shared = self._followed_head(pushes, edited, scale)
        curvature = step_curvature(attachment, pushes, scale, self._store.of(attachment.weight))
        if self._better is not None:
            curvature = self._better(curvature)
        self.layer_curvature = curvature
        gathered = gathered_gradients(attachment, pushes)
        own = gathered if self._units is None else pushes
        return StepMeasures(gathered, scale, curvature, shared, own)

    def begin(self, found: StepMeasures) -> ShadowTerms:
        """Make the shadows, where there are none yet, and what drives them.

        Args:
            found: as :meth:`measure` returns it.
        """
        attachment, weight = self._attachment, self._attachment.weight
        noise, count = attachment.noise, attachment.samples.row_count
        state = self._store.of(weight)
        assert noise is not None
        assert count is not None
        gradient, curvature = found.pushes.by_sample, found.curvature
        if attachment.holds_all(found.pushes.placement):
            self._watches.look(gradient, found.scale, curvature, self._group)
        attachment.shadows.make(state, noise, count, gradient)
        attachment.remember_samples(state)
        state["shadow_step"] = state.get("shadow_step", 0) + 1
        if attachment.oversight.has_found and falls_back(attachment.estimator):
            # A run that goes on from this state must not wait for an audit of its own.
            state[FELL_BACK] = torch.ones(())
        damped = self._damped(curvature, noise.eigenvalues)
        return ShadowTerms(weight, gradient, curvature, noise, self._damping, found.scale, damped)

    def finish(self) -> None:
        """Give up the pending forwards, whose step is made."""
        self._attachment.drop()
        self._attachment.samples.finish()

    def require_delivered(self) -> None:
        """Check that the pending forwards have their gradients.

        Raises:
            RuntimeError: if one lacks its own.
        """
        attachment = self._attachment
        lacks = any(c.gradient is None for c in attachment.pending)
        if lacks or attachment.layers.gradient is None:
            raise RuntimeError(
                "DecoupledDescent: step() before loss.backward(): a training forward has no "
                f"gradient at layer {attachment.name!r}. Call loss.backward() on a loss of that "
                "forward, or optimizer.drop_forward() to give it up."
            )

    def _followed_head(
        self, pushes: StepGradients, edit: float | Tensor, scale: float | Tensor
    ) -> Tensor | None:
        """H_ψ, or None where the head is not corrected, or not any more."""
        attachment = self._attachment
        if attachment.shared is None or not attachment.head_is_optional:
            return self._shared_curvature(pushes, edit, scale)
        if attachment.ranks.size > 1:
            leave_head(
                attachment, "it is followed on one process", begun=self._store.leave(attachment)
            )
            return None
        try:
            if pushes.scores is not None and pushes.scores.gradient is not None:
                pushes.scores.require_weights_of_labels()
            return self._shared_curvature(pushes, edit, scale)
        except RuntimeError as error:
            leave_head(attachment, error, begun=self._store.leave(attachment))
            return None

    def _shared_curvature(
        self, pushes: StepGradients, edit: float | Tensor, scale: float | Tensor
    ) -> Tensor | None:
        attachment, shared = self._attachment, self._attachment.shared
        if shared is None:
            return None
        edit, scale = float(edit), float(scale)
        if pushes.scores is None or pushes.scores.gradient is None:
            raise RuntimeError(
                f"DecoupledDescent: head {shared.name!r} took no part in the last training forward "
                "and backward; name the layer that computes the scores with head="
            )
        shared.check_gradients(pushes.gradient, pushes.scores, edit, attachment.ranks)
        curvature = shared.curvature(pushes, scale, attachment.ranks)
        if attachment.holds_all(pushes.placement):
            self._watches.look_at_edge(curvature, self._store.groups)
        return curvature

    def _of_shared(
        self, pushes: StepGradients, scale: float | Tensor, curvature: Tensor
    ) -> list[ShadowUpdate]:
        shared, count = self._attachment.shared, self._attachment.samples.count
        assert shared is not None
        assert pushes.signal is not None
        assert count is not None
        shared.make(self._store.read, self._store.write, count, pushes.signal)
        found = shared.shadow_gradients(
            pushes, curvature, float(scale), self._store.read, self._units
        )
        return [self._moved(*part) for part in found]

    @property
    def _units(self) -> Units | None:
        noise = self._attachment.noise
        return None if noise is None else noise.units

    @property
    def _group(self) -> dict[str, Any]:
        """Settings of the decoupled weight."""
        group = self._store.group_of(self._attachment.weight)
        assert group is not None
        return group

    def _of_layer(self, found: StepMeasures) -> ShadowUpdate:
        attachment, state = self._attachment, self._store.of(self._attachment.weight)
        push, momentum = self.begin(found), self._group["momentum"] != 0
        placement, shadows = found.pushes.placement, attachment.shadows
        assert isinstance(shadows, Shadows)
        return shadows.update(state, placement, push, momentum=momentum)

    def _damped(self, curvature: Tensor, eigenvalues: Tensor) -> Tensor | None:
        weight = self._attachment.weight
        assert weight.grad is not None
        if self._damping == 1.0:
            return None
        found = damped_weight_gradient(weight.grad, weight, curvature, eigenvalues, self._damping)
        return found.to(weight.dtype)

    def _idle(self) -> list[ShadowUpdate]:
        # Momentum and weight decay move W on a zero gradient too, and then they move Q.
        attachment = self._attachment
        attachment.shadows.flush(self._store.of(attachment.weight))
        found = [(p, key, self._store.read(p, key)) for p, key in attachment.shadowed]
        return [
            self._moved(parameter, key, shadow, torch.zeros_like(shadow))
            for parameter, key, shadow in found
            if shadow is not None
        ]

    def _moved(self, parameter: Tensor, key: str, shadow: Tensor, gradient: Tensor) -> ShadowUpdate:
        buffer_key = f"{key}_momentum_buffer"
        buffer = self._store.read(parameter, buffer_key)
        keep = momentum_writer(self._store.of(parameter), buffer_key)
        piece = ShadowSlice(..., shadow, gradient, buffer, keep)
        return ShadowUpdate(parameter, shadow, lambda: iter([piece]))

    def require_idle(self) -> None:
        """Check that a step without a training forward has no gradients.

        Raises:
            RuntimeError: if it has.
        """
        # Distributed checkpointing creates optimizer state by a step on zero gradients.
        if self._store.has_gradients():
            raise RuntimeError(
                "DecoupledDescent: step() without a training forward. The gradients come from "
                f"somewhere else than layer {self._attachment.name!r} in train mode: call "
                "model.train() before the forward, name the layer that the forward uses with "
                "layer=, call torch._dynamo.reset() if the model was compiled and run before it "
                "was attached, or call optimizer.detach() to go on as plain SGD."
            )

    def _check_finite(self) -> None:
        attachment, groups = self._attachment, self._store.groups
        captured = [c.gradient for c in attachment.pending if c.gradient is not None]
        moved = [p for group in groups for p in group["params"] if p.grad is not None]
        found = [stored_numbers(p.grad.detach()) for p in moved if p.grad is not None]
        defers, terms = attachment.verdicts.defers, seen_terms(attachment)
        # A number of G that is not finite leaves no term of ∂L/∂W that is.
        if terms and not defers and bool(all_finite(*(t.along for t in terms), *found).all()):
            return
        gradients = [*(gradient.detach() for gradient in captured), *found]
        finite = all_finite(*gradients)
        if not defers and not bool(finite.all()):
            # A sum may overflow where no number does.
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients])
        step = self._store.of(attachment.weight).get("shadow_step", 0)
        count = len(captured)

        def explain(flags: list[bool]) -> FloatingPointError:
            # What it refers to lives until the verdict, which may be some steps off.
            names = [f"the output of {attachment.name!r}"] * count
            names += _names(attachment.module, moved)
            return _not_finite(names, flags, step)

        try:
            attachment.verdicts.require(finite, explain)
        except FloatingPointError:
            attachment.drop()
            raise


def _names(module: nn.Module, parameters: Sequence[Tensor]) -> list[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [known.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]


def _not_finite(names: Sequence[str], finite: list[bool], step: int) -> FloatingPointError:
    bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
    return FloatingPointError(
        f"DecoupledDescent: the gradient of {', '.join(dict.fromkeys(bad))} is not finite at "
        f"step {step}; nothing was updated. Likely causes: the learning rate is too large "
        "(halve it), or the inputs or targets contain NaN or infinity."
    )
