"""One step of an optimizer of any kind, seen from before and from after."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadow_step import ShadowStep, StepMeasures
from dd.correction.training_forward import full_precision, refuse_capture
from dd.correction.weight_gradient import weight_edit
from dd.functional.response import NoiseBins
from dd.noise.parts import LEADING_PER_SAMPLE
from dd.noise.quadrature import leading_counts
from dd.rules.followed_states import FollowedStates, own_states, pools_units
from dd.rules.quantities import AVERAGE_RATES, OptimizerStep, average_name
from dd.rules.response import Response, ResponseIdentifier
from dd.rules.response_shadows import ResponseShadows
from dd.rules.scaled_steps import is_skipped, unscaling
from dd.rules.shared_steps import SharedSteps
from dd.rules.value_clipping import unclipped_gradient
from dd.watch.step_watches import Unwatched

__all__ = ["ResponseStep", "require_unmoved"]


@dataclass(frozen=True, eq=False)
class _Due:
    """What a step is to be compared with; gradient and measures of none are None."""

    before: Tensor
    states: dict[str, Tensor]
    gradient: Tensor | None
    step: ShadowStep
    measures: StepMeasures | None


class ResponseStep:
    """Moves shadows by the response that is identified of each step.

    Args:
        attachment: the bond to the model, whose shadows are :class:`ResponseShadows`.
        store: what is kept of each parameter.
        optimizer: moves the decoupled weight.
        shared: moves the displacements of what all samples share, where the head is corrected.

    Attributes:
        identifier: knows what was found so far.
        response: of the last step, or None.
    """

    def __init__(
        self,
        attachment: Attachment,
        store: OptimizerState,
        optimizer: torch.optim.Optimizer,
        shared: SharedSteps | None = None,
    ) -> None:
        self._attachment, self._store, self._optimizer = attachment, store, optimizer
        self._shared = shared
        self._due: _Due | None = None
        self.identifier = ResponseIdentifier()
        self._followed = FollowedStates(attachment, store, self.identifier, optimizer)
        self.response: Response | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Look at what the step will be made from.

        Raises:
            RuntimeError: as :meth:`dd.correction.shadow_step.ShadowStep.measure`.
            FloatingPointError: likewise.
        """
        attachment, weight = self._attachment, self._attachment.weight
        self._due = None
        attachment.require_own()
        refuse_capture("step()")
        if is_skipped(self._optimizer):
            return
        step = ShadowStep(attachment, self._store, Unwatched(), 1.0)
        with full_precision(weight):
            gradient, measures = None, None
            if attachment.pending:
                edited = _EditedGradient(unscaling(self._optimizer))
                measures = step.measure(edited)
                gradient = edited.gradient
                if self._shared is not None:
                    self._shared.take(measures)
            else:
                step.require_idle()
            self._followed.take_up()
            states = self.identifier.watched(own_states(self._optimizer, weight))
            kept = {key: value.clone() for key, value in states.items()}
            self._due = _Due(weight.detach().clone(), kept, gradient, step, measures)

    @torch.no_grad()
    def after(self) -> None:
        """Move the shadows as the weight was moved.

        Raises:
            RuntimeError: if a tensor of the optimizer's state has vanished.
            ValueError: if the layer has too few inputs to tell the response.
        """
        due, self._due = self._due, None
        attachment, weight = self._attachment, self._attachment.weight
        if due is None:
            # A gradient scaler has found what is not finite.
            self.drop()
            attachment.drop()
            attachment.samples.release()
            return
        state = self._store.of(weight)
        if due.measures is None and state.get("shadow") is None:
            return
        with full_precision(weight):
            terms, placement = None, None
            if due.measures is not None:
                terms, placement = due.step.begin(due.measures), due.measures.pushes.placement
            step = self._step(due, state)
            self.response = response = self.identifier.identify(step)
            averages = self.identifier.averages
            kept = {position: step.averages[position] for position in averages}
            shadows = attachment.shadows
            assert isinstance(shadows, ResponseShadows)
            shadows.move(state, placement, terms, response, averages=averages)
            if self._shared is not None:
                self._shared.move_weight(response, averages=averages)
            for position in range(len(AVERAGE_RATES)):
                key = _average_key(position)
                if position in kept:
                    state[key] = kept[position]
                else:
                    state.pop(key, None)
            attachment.remember_weight(state)
            self._followed.mark()
        due.step.finish()

    def drop(self) -> None:
        """Forget a step that was begun."""
        self._due = None
        if self._shared is not None:
            self._shared.drop()

    def _step(self, due: _Due, state: dict[str, Any]) -> OptimizerStep:
        weight = self._attachment.weight.detach()
        gradient = torch.zeros_like(weight) if due.gradient is None else due.gradient
        averages = {}
        for position in self.identifier.missing_averages:
            kept, rate = state.get(_average_key(position)), AVERAGE_RATES[position]
            averages[position] = (
                (1 - rate) * gradient if kept is None else gradient.lerp(kept, rate)
            )
        states = self.identifier.watched(own_states(self._optimizer, self._attachment.weight))
        return OptimizerStep(
            due.before,
            weight,
            gradient,
            due.states,
            states,
            averages,
            self._signal_directions(),
            None if due.measures is None else self._noise_bins(len(due.measures.pushes.gradient)),
            pools_units(self._optimizer, self._attachment.weight),
        )

    def _noise_bins(self, rows: int) -> NoiseBins | None:
        """Bins of the noise whose directions are known, and cost no more than a step on the rows.

        Args:
            rows: of the step, on this process.
        """
        noise, rows = self._attachment.noise, rows * self._attachment.ranks.size
        if noise is None or noise.leading_directions is None:
            return None
        directions = noise.leading_directions
        ends = leading_counts(noise.multiplicities, directions.shape[1])
        # Bins may have been put in the place of those that were measured.
        if ends[-1:] != [directions.shape[1]]:
            return None
        ends = [end for end in ends if end <= LEADING_PER_SAMPLE * rows]
        if not ends:
            return None
        return NoiseBins(directions[:, : ends[-1]], ends, len(noise.multiplicities))

    def _signal_directions(self) -> Tensor | None:
        """Span of the component means, in which a gradient is no noise, or None."""
        noise = self._attachment.noise_of_all
        if noise is None:
            return None
        if noise.mean_directions is None and noise.is_in_both_forms:
            noise = noise.with_means_apart()
        directions = noise.mean_directions
        # All directions would leave nothing.
        if directions is None or directions.shape[1] == directions.shape[0]:
            return None
        return directions


class _EditedGradient:
    """Finds the gradient that an optimizer sees, and its scale over what was delivered."""

    gradient: Tensor

    def __init__(self, unscaling: float) -> None:
        self._unscaling = unscaling

    def __call__(self, attachment: Attachment, pushes: StepGradients) -> float | Tensor:
        weight = attachment.weight
        assert weight.grad is not None
        try:
            edit = weight_edit(attachment, pushes)
            self.gradient = weight.grad.detach().to(weight.dtype) * self._unscaling
        except RuntimeError as error:
            if attachment.ranks.size > 1:
                raise
            try:
                found, edit = unclipped_gradient(attachment, pushes)
            except ValueError:
                raise error from None
            self.gradient = found.to(weight.dtype) * self._unscaling
        return edit * self._unscaling


def _average_key(position: int) -> str:
    return f"gradient_{average_name(position)}"


def _has_moved(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    """Whether an optimizer has made steps on a weight."""
    state = optimizer.state.get(weight, {})
    if "step" in state:
        return float(state["step"]) > 0
    return any(bool(value.count_nonzero()) for value in own_states(optimizer, weight).values())


def require_unmoved(optimizer: torch.optim.Optimizer, attachment: Attachment) -> None:
    """Check that an optimizer without shadows has made no steps.

    Raises:
        RuntimeError: if it has.
    """
    if _has_moved(optimizer, attachment.weight):
        raise RuntimeError(
            f"dd.decouple: {type(optimizer).__name__} has made steps on layer {attachment.name!r} "
            "without correction. Call dd.decouple before the first step, or load the tracker's "
            "state as well as the optimizer's."
        )
