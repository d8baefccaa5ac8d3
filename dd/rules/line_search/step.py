"""One step of ``lr="auto"``: where it may lead, where the policy sends it, and the move."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import Capture
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadow_step import ShadowStep
from dd.correction.training_forward import full_precision
from dd.correction.weight_gradient import pending_gradients, weight_edit
from dd.functional import at_least_single
from dd.rules.line_search.best_state import BestState
from dd.rules.line_search.extra_probes import refined
from dd.rules.line_search.family import LineFamily
from dd.rules.line_search.moving_tensors import LinearResponse, Maps, Part, linear_response
from dd.rules.line_search.product_cache import PRODUCT, FirstForward, keep_product
from dd.rules.line_search.replay import ClosureReplay, forward_replaced, own_statistics
from dd.rules.line_search.search import Point, Policy
from dd.rules.line_search.settings import require_dense, require_loss, require_plain_rule
from dd.rules.line_search.stopping import Outputs, StopRule
from dd.support.user_warning import warn_user
from dd.watch.step_watches import StepWatches
from dd.watch.strain import StrainWarning, means_strain_message

__all__ = ["LineStep", "NoSignalWarning", "SearchWarning"]

MEMORY = "shadow_memory"

LOST = (
    'DecoupledDescent: lr="auto" found no signal: after 20 rotations of the weights the training '
    "loss was no clearer below that of the best constant prediction than chance makes it, or lower "
    "than the plain network's, which only a wrong noise model does. The weights are left at zero. "
    "Other initial weights, another activation (an odd one sees no even signal), more samples, or "
    "noise=dd.NoiseModel.fit(inputs, components) may help; a numeric lr goes slower, and may find "
    "what is weak."
)


# A plain loss above the tracked one by this share of what a constant prediction loses is no chance.
MOST_EXCESS = 0.02

BEYOND = "A step was tracked below the loss of the plain network on its own training samples."
EXCEEDED = (
    'DecoupledDescent: a step of lr="auto" leads where the loss of the plain network on its own '
    "training samples is above the tracked one by more than chance explains, though memory of the "
    "samples can only lower it: the correction takes away more than there is, and the training "
    "error is not to be believed from here on. Give lr a number, use fewer units, or a noise model "
    "that fits these inputs."
)


class SearchWarning(UserWarning):
    """A search went where the tracked loss cannot be that of new samples.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.SearchWarning)  # end such a run at once
        >>> optimizer = dd.DecoupledDescent(model, lr="auto", noise=dd.NoiseModel.fit(X, y))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(X), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # nothing to warn of
    """


class NoSignalWarning(UserWarning):
    """No step that ``lr="auto"`` tried told more than a constant prediction.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.NoSignalWarning)  # end such a run at once
        >>> inputs, labels = X[:200, :10], torch.randint(2, (200,))  # labels of nothing
        >>> linear = torch.nn.Linear(10, 2)
        >>> optimizer = dd.DecoupledDescent(linear, lr="auto", noise=dd.NoiseModel.fit(inputs))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(linear(inputs), labels)
        ...     loss.backward()
        ...     return loss
        >>> for step in range(30):
        ...     loss = optimizer.step(closure)
        Traceback (most recent call last):
            ...
        dd.rules.line_search.step.NoSignalWarning: DecoupledDescent: lr="auto" found no signal: ...
    """


class LineStep:
    """One step of an attached optimizer whose length a policy chooses.

    Args:
        attachment: without pending training forwards.
        store: the optimizer's state.
        policy: chooses the point.
        stops: whether training stops by itself.
    """

    def __init__(
        self, attachment: Attachment, store: OptimizerState, policy: Policy, *, stops: bool
    ) -> None:
        self._attachment, self._store, self._policy = attachment, store, policy
        self._stops = stops
        parameters = [p for group in store.groups for p in group["params"]]
        self._moving = [p for p in parameters if p.requires_grad]
        self._state = store.of(attachment.weight)
        self._first = FirstForward(attachment, self._state)
        self._rewind = ClosureReplay(attachment.module, parameters, attachment.weight.device)

    def __call__(self, closure: Callable[[], Any]) -> Any:
        """Call the closure, choose a point and move there; or leave everything as it was.

        Where training stops, go back to the best state instead.

        Returns:
            What the first call of the closure returned.

        Raises:
            ValueError: if the settings ask for more than plain gradient steps, or the policy for
                a point that is not finite.
            TypeError: if the closure does not return its loss.
            RuntimeError: if the closure does not do one forward and backward of all samples.
            FloatingPointError: if the loss or a gradient is not finite.
        """
        self._require_possible()
        outputs = Outputs()
        with self._first_call(outputs):
            loss = closure()
        require_loss(loss)
        signal = self._only_forward().signal
        require_dense(self._moving)
        self._look_at_means()
        before = {parameter: dict(state) for parameter, state in self._store.state.items()}
        try:
            self._require_unedited()
            parts, maps = self._parts(self._refined(closure))
            if self._stops and self._has_stopped(float(loss.detach()), outputs, parts):
                return loss
            linear_responses = self._responses(parts, maps, signal)
            point, memory = self._chosen(closure, parts, linear_responses, float(loss.detach()))
        except BaseException:
            self._store.state.clear()
            self._store.state.update(before)
            raise
        exceeds = memory.get("excess", 0.0) > MOST_EXCESS
        if exceeds and self._attachment.oversight.doubt(BEYOND):
            warn_user(EXCEEDED, SearchWarning)
        if memory.get("lost") and not self._state.get(MEMORY, {}).get("lost"):
            warn_user(LOST, NoSignalWarning)
        self._state[MEMORY] = memory
        self._move(parts, maps, point)
        if memory.get("informed") == 0.0:
            self._forget_shared()
        return loss

    def _look_at_means(self) -> None:
        """Warn before the first step of too many directions that are corrected apart."""
        attachment, noise = self._attachment, self._attachment.noise
        apart = None if noise is None else noise.mean_directions
        if attachment.shared is None or apart is None or MEMORY in self._state:
            return
        sentence = means_strain_message(apart.shape[1], attachment.layer.in_features)
        if sentence is not None:
            warn_user(f"DecoupledDescent: {sentence}", StrainWarning)

    @torch.no_grad()
    def _forget_shared(self) -> None:
        """Let what all samples share start anew.

        Where weights do not know of the signal yet, it grows: the curvature along it is negative,
        and H_ψ, which is not, would turn every displacement around in a long step.
        """
        shared = self._attachment.shared
        for part in () if shared is None else shared.parts:
            displacement = self._store.read(*part)
            if displacement is not None:
                displacement.zero_()

    @contextmanager
    def _first_call(self, outputs: Outputs) -> Iterator[None]:
        attachment = self._attachment
        with ExitStack() as stack:
            stack.enter_context(forward_replaced(attachment.layer, self._first.forward))
            stack.enter_context(own_statistics(attachment.module))
            if self._stops:
                stack.enter_context(outputs.watched(attachment.module))
            yield stack.enter_context(torch.enable_grad())

    @torch.no_grad()
    def _require_unedited(self) -> None:
        """Check that gradients are as the backward pass left them.

        Raises:
            RuntimeError: if there are none, or they were edited.
        """
        ShadowStep(self._attachment, self._store, StepWatches(), 1.0).require_delivered()
        with full_precision(self._attachment.weight):
            edit = weight_edit(self._attachment, pending_gradients(self._attachment))
        if edit != 1.0:
            raise RuntimeError(
                f"DecoupledDescent: the closure multiplied its gradients by {edit:.4g}, as "
                'clipping does; lr="auto" chooses the length of the step itself, from gradients as '
                "loss.backward() leaves them"
            )

    def _refined(self, closure: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        self._rewind.take()
        try:
            return refined(self._attachment, self._first, closure, self._rewind)
        finally:
            self._rewind.finish()

    def _has_stopped(self, loss: float, outputs: Outputs, parts: list[Part]) -> bool:
        attachment, memory = self._attachment, dict(self._state.get(MEMORY, {}))
        assert attachment.samples.count is not None
        outputs.require(attachment.samples.count)
        rule = StopRule(self._state, memory)
        is_best = rule.look(loss, outputs)
        self._state[MEMORY] = memory
        best = BestState(self._store, attachment.module, attachment.weight)
        if is_best:
            best.keep(parts)
        if rule.stopped:
            best.restore()
            attachment.remember_weight(self._state)
        return rule.stopped

    def _require_possible(self) -> None:
        """Check what can be known before the closure is called.

        Raises:
            ValueError: if a setting or the processes do not go with a line search.
        """
        for group in self._store.groups:
            require_plain_rule(group)
        if self._attachment.ranks.size > 1:
            raise ValueError(
                'DecoupledDescent: lr="auto" searches on one process, but '
                f"{self._attachment.ranks.size} share the samples; give lr a number, or train "
                "every process alone (process_group=False)"
            )

    def _only_forward(self) -> Capture:
        """The training forward of the first call.

        Raises:
            RuntimeError: if there is none, there are several, or it does not hold all samples.
        """
        attachment, pending = self._attachment, self._attachment.pending
        if len(pending) != 1 or self._first.product is None:
            raise RuntimeError(
                'DecoupledDescent: with lr="auto" one call of the closure runs the model once in '
                "train mode, on all training samples, and calls loss.backward() once; found "
                f"{len(pending)} training forwards of layer {attachment.name!r}. For accumulated "
                "gradients give lr a number."
            )
        if pending[0].placement.index is not None:
            rows = len(pending[0].placement.fingerprints)
            raise RuntimeError(
                'DecoupledDescent: lr="auto" chooses the step on the loss of all '
                f"{attachment.samples.count} samples, in the order in which they were first seen; "
                f"the closure's batch holds {rows} of them, or another order. Give lr a number "
                "for mini-batches."
            )
        return pending[0]

    @torch.no_grad()
    def _parts(self, better: Callable[[Tensor], Tensor]) -> tuple[list[Part], Maps]:
        """Everything that moves, where to, and the maps of the hidden units.

        Args:
            better: makes the step's own estimate of the curvature a better one.
        """
        attachment = self._attachment
        with full_precision(attachment.weight):
            # The watches judge learning rates that were given.
            step = ShadowStep(attachment, self._store, StepWatches(), 1.0, better)
            updates = step.updates()
            parts = [self._part(p, None, p, _descent(p)) for p in self._moving]
            for (owner, key), update in zip(attachment.shadowed, updates, strict=True):
                parts.append(self._part(owner, key, update.tensor, -update.gradient()))
            return [*parts, self._product_part()], Maps.of(step.layer_curvature)

    def _product_part(self) -> Part:
        weight, first = self._attachment.weight, self._first
        assert first.inputs is not None
        assert first.product is not None
        descent = at_least_single(_descent(weight))
        along = torch.nn.functional.linear(first.inputs.to(descent.dtype), descent)
        return self._part(weight, PRODUCT, first.product, along)

    def _part(self, owner: Tensor, key: str | None, tensor: Tensor, descent: Tensor) -> Part:
        units = None
        if owner is self._attachment.weight:
            units = -1 if key in ("shadow", PRODUCT) else -2
        return Part(owner, key, tensor, descent, units)

    @torch.no_grad()
    def _responses(self, parts: list[Part], maps: Maps, signal: Tensor | None) -> LinearResponse:
        with full_precision(self._attachment.weight):
            return linear_response(parts, maps, self._attachment.shared, signal)

    @torch.no_grad()
    def _chosen(
        self,
        closure: Callable[[], Any],
        parts: list[Part],
        linear_responses: LinearResponse,
        loss: float,
    ) -> tuple[Point, dict[str, float]]:
        attachment, dtype = self._attachment, self._first.dtype
        assert dtype is not None
        family = LineFamily(
            attachment, parts, linear_responses, closure, self._rewind, loss, dtype=dtype
        )
        memory = dict(self._state.get(MEMORY, {}))
        try:
            if not memory.get("checked"):
                family.require_its_loss()
            point = self._policy.choose(family, memory)
            if not point.is_finite:
                raise ValueError(
                    f"DecoupledDescent: the policy {type(self._policy).__name__} must return a "
                    f"finite point, got {point}"
                )
            family.settle_statistics(point)
            memory["checked"] = 1.0
        finally:
            family.restore()
        return point, memory

    @torch.no_grad()
    def _move(self, parts: list[Part], maps: Maps, point: Point) -> None:
        attachment, first = self._attachment, self._first
        with full_precision(attachment.weight):
            for part in parts:
                part.move(point, maps)
            assert first.product is not None
            keep_product(self._state, attachment.weight, first.product, first.age + 1)
            attachment.remember_weight(self._state)
        for group in self._store.groups:
            group["lr"] = point.step


def _descent(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else -gradient.detach()
