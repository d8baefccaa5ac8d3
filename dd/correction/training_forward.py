"""What happens at the decoupled layer and at the head in a training forward."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.correction.capture import Capture
from dd.correction.gradient_terms import product_node
from dd.correction.head import SharedParameters
from dd.correction.head_form import leave_head
from dd.correction.layer_forward import begin, corrected, place
from dd.correction.optimizer_state import OptimizerState
from dd.samples.placement import Placement
from dd.watch.step_watches import StepWatches

__all__ = ["TrainingForward", "full_precision", "probe_seed", "refuse_capture"]


class TrainingForward:
    """One training forward of an attached model.

    Args:
        attachment: the bond to the model.
        store: the optimizer's state.
        watches: see the forwards of all samples.
        seed: of the curvature probes.
        defers: whether its step may go on before its conditions are known.
    """

    def __init__(
        self,
        attachment: Attachment,
        store: OptimizerState,
        watches: StepWatches,
        seed: int,
        *,
        defers: bool,
    ) -> None:
        self._attachment, self._store = attachment, store
        self._watches, self._seed, self._defers = watches, seed, defers

    def at_layer(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the decoupled layer; None where it stays as it is.

        Args:
            layer: that ran.
            inputs: shape (m, d), or (m, …, d) of samples of several rows.
            output: shape (m, k), or (m, …, k).

        Raises:
            RuntimeError: if the forward or the state does not fit the attachment.
        """
        attachment = self._attachment
        if not layer.training:
            return None
        if layer not in attachment.layers:
            _refuse_replica(layer)
            return None
        if attachment.layers.are_several:
            waiting = attachment.layers.waiting(layer, inputs)
            if waiting is not None:
                return waiting
            joined = attachment.layers.outputs(layer, inputs, output)
            return attachment.layers.split(layer, inputs, self._at_layers(inputs, joined))
        return self._at_layers(inputs, output)

    def _at_layers(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Correct the output of all decoupled layers, shape (m, k) or (m, …, k).

        Raises:
            RuntimeError: as :meth:`at_layer`.
        """
        attachment = self._attachment
        refuse_capture("a training forward")
        attachment.require_weight_in_place()
        state = self._store.of(attachment.weight)
        if torch.is_grad_enabled() and _is_differentiating():
            with full_precision(output):
                again = self._as_before(_rows(inputs), _rows(output))
                return again.view(output.shape)
        if state.get("shadow") is None and self._has_moved(state.get("momentum_buffer")):
            raise RuntimeError(
                f"DecoupledDescent: layer {attachment.name!r} has momentum from steps without "
                "correction. Attach before the first step, or load the state of an attached "
                "optimizer."
            )
        leads_to_step = torch.is_grad_enabled()
        if leads_to_step and attachment.has_delivered and not self._store.has_gradients():
            # Cleared by other means than zero_grad(), as after a skipped step.
            attachment.drop_abandoned()
        attachment.verdicts.settle()
        defers = leads_to_step and self._defers and not self._watches.looks
        if defers and self._store.may_defer(attachment):
            attachment.verdicts.defer(state.get("shadow_step", 0))
        with full_precision(output):
            if inputs.dim() < 3:
                return self._corrected(inputs, output, leads_to_step=leads_to_step)
            inputs = inputs.flatten(1, -2)
            found = self._corrected(inputs, _rows(output), leads_to_step=leads_to_step)
            return found.view(output.shape)

    def _has_moved(self, momentum: Tensor | None) -> bool:
        return momentum is not None and bool(momentum.count_nonzero())

    def _corrected(self, inputs: Tensor, output: Tensor, *, leads_to_step: bool) -> Tensor:
        attachment, state = self._attachment, self._store.of(self._attachment.weight)
        placement = place(attachment, inputs, state, binds=leads_to_step)
        attachment.now = placement
        attachment.rows_seen += len(inputs)
        if placement is not None:
            placement = attachment.samples.rows_of(placement, inputs)
        if placement is not None and state.get("shadow") is not None:
            self._require_same_head()
        is_product = attachment.is_plain and not attachment.layers.are_several
        product = product_node(output, attachment.weight) if is_product else None
        looks = attachment.shared is not None and attachment.repeats == 0
        looks = looks and state.get("shadow") is not None
        # What the shadows are added to in place.
        plain = None
        if looks and attachment.oversight.looks_at_shadows(attachment.subject):
            plain = output.detach().clone()
        result, signal = corrected(attachment, placement, output, state), None
        if attachment.shared is not None:
            signal = self._signal(inputs, placement)
            index = None if placement is None else placement.index
            result = attachment.shared.correct_preactivation(
                result, signal, self._store.read, index
            )
        if plain is not None and placement is not None:
            moved = result.detach() - plain
            attachment.oversight.look_at_shadows(attachment.subject, moved, result)
        if not leads_to_step:
            return result
        assert placement is not None
        outgoing = self._captured(placement, inputs, result, product)
        attachment.pending[-1].signal = signal
        if attachment.holds_all(placement):
            self._watches.observe(attachment.noise, result)
        return outgoing

    def _as_before(self, inputs: Tensor, output: Tensor) -> Tensor:
        """What a pending forward handed on, where checkpointing computes it once more.

        Raises:
            RuntimeError: if there was no such forward.
        """
        attachment = self._attachment
        capture = _pending_of(attachment, inputs)
        placement, index = capture.placement, capture.placement.index
        result = corrected(attachment, placement, output, self._store.of(attachment.weight))
        if attachment.shared is not None:
            signal = self._signal(inputs, placement)
            result = attachment.shared.correct_preactivation(
                result, signal, self._store.read, index
            )
        return capture.outgoing(result)

    def _require_same_head(self) -> None:
        attachment = self._attachment
        if attachment.shared is None:
            return
        try:
            attachment.shared.check_weight()
        except RuntimeError as error:
            if not attachment.head_is_optional:
                raise
            leave_head(attachment, error, begun=self._store.leave(attachment))

    def _captured(
        self, placement: Placement, inputs: Tensor, preactivation: Tensor, product: Any
    ) -> Tensor:
        attachment, state = self._attachment, self._store.of(self._attachment.weight)
        for parameter, _ in attachment.shadowed:
            self._store.require_own(attachment, parameter)
        self._store.require_one_group(attachment)
        step = state.get("shadow_step", 0)
        forward = len(attachment.pending) + attachment.repeats
        seed = probe_seed(self._seed, step, forward, attachment.ranks.rank)
        shadow = state.get("shadow")
        outgoing = begin(
            attachment,
            placement,
            inputs,
            preactivation,
            seed,
            has_shadow=shadow is not None,
            product=product,
        )
        if shadow is not None:
            self._require_fitting_state(len(shadow))
        return outgoing

    def _signal(self, inputs: Tensor, placement: Placement | None) -> Tensor:
        shared, count = self._attachment.shared, self._attachment.samples.count
        assert shared is not None
        signal = shared.signal(inputs, placement)
        # What a state lacks is found out below; what it has must reach all samples.
        has_shadows = all(self._store.read(*part) is not None for part in self._attachment.shadowed)
        if placement is not None and count is not None and has_shadows:
            with torch.no_grad():
                shared.make(self._store.read, self._store.write, count, signal)
        return signal

    def _require_fitting_state(self, bins: int) -> None:
        attachment, read = self._attachment, self._store.read
        assert attachment.noise is not None
        expected = len(attachment.noise.eigenvalues)
        missing = any(read(*part) is None for part in attachment.shadowed)
        corrected = attachment.shared is not None
        surplus = not corrected and read(attachment.weight, "signal_shadow") is not None
        if bins == expected and not missing and not surplus:
            return
        attachment.drop()
        raise RuntimeError(
            f"DecoupledDescent: the state holds {bins} shadows a sample"
            + ("" if missing else " and those of a corrected head" if surplus else "")
            + f", but this optimizer's noise model has {expected} bins and head={corrected}. Load "
            "a state into an optimizer of the same noise model and head= as the one it came from."
        )

    def at_head(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the head; None where it stays as it is.

        Args:
            head: that ran.
            inputs: shape (m, f).
            output: scores, shape (m, C).

        Raises:
            RuntimeError: if the head runs twice in a training forward, or cannot be differentiated.
            ValueError: if it does not receive one row a sample.

        Warns:
            StrainWarning: if any of these happens to a head whose correction nobody asked for.
        """
        attachment, shared = self._attachment, self._attachment.shared
        if shared is None or not attachment.layer.training:
            return None
        if head is not shared.head or not head.training:
            return None
        if not attachment.head_is_optional:
            return self._corrected_scores(shared, inputs, output)
        try:
            return self._corrected_scores(shared, inputs, output)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            # Whatever a head of the user's own does, nobody asked to follow it.
            leave_head(attachment, error, begun=self._store.leave(attachment))
            return None

    def _corrected_scores(self, shared: SharedParameters, inputs: Tensor, output: Tensor) -> Tensor:
        attachment = self._attachment
        # A marked tensor must not see the hook, nor an operation in place the tensor under it.
        with full_precision(output), torch._C.DisableTorchFunctionSubclass():
            features = shared.features(inputs)
            index = None if attachment.now is None else attachment.now.index
            corrected = shared.correct_scores(output, features, self._store.read, index)
            # Without a pending forward the head runs by itself, and no step will come of it.
            if not torch.is_grad_enabled() or not attachment.pending:
                return corrected
            if _is_differentiating():
                return corrected if type(output) is Tensor else corrected.as_subclass(type(output))
            if attachment.pending[-1].scores is not None:
                raise RuntimeError(
                    f"DecoupledDescent: head {shared.name!r} must run once in every training "
                    f"forward, after layer {attachment.name!r}; run other forwards under "
                    "model.eval() or torch.no_grad()"
                )
            if corrected is output:
                corrected = output.clone()
            # A forward made again for more probes is of known scores.
            if attachment.repeats == 0:
                attachment.pending[-1].follow(output, corrected, features)
        return corrected if type(output) is Tensor else corrected.as_subclass(type(output))


def _rows(values: Tensor) -> Tensor:
    """One row after the other, shape (m, d), of samples of one row or several."""
    return values.flatten(0, -2)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Leave the caller's autocast, under which the correction would be rounded."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def refuse_capture(what: str) -> None:
    """Refuse to be part of a CUDA graph.

    Raises:
        RuntimeError: if one is captured.
    """
    # Asking a device that was never used would start it.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"DecoupledDescent: {what} while a CUDA graph is captured. A graph replays the same "
            "kernels, but the correction looks at every batch and every gradient on the CPU. Run "
            "training forwards and step() outside of torch.cuda.graph; capture nothing, or what "
            "lies between the decoupled layer and the loss"
        )


def probe_seed(seed: int, step: int, forward: int = 0, rank: int = 0) -> int:
    """Seed of the probe of one training forward.

    Args:
        seed: of the optimizer.
        step: number of updates so far.
        forward: number of forwards before it that lead to the same step.
        rank: of the process.
    """
    # The first forward of a step on a single process draws what it always drew.
    apart = 0xBF58476D1CE4E5B9 * (forward + 2**16 * rank)
    return (seed * 0x9E3779B97F4A7C15 + step + apart) % 2**63


def _is_differentiating() -> bool:
    """Whether this runs inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _pending_of(attachment: Attachment, inputs: Tensor) -> Capture:
    """The pending forward of the same inputs, shape (m, d).

    Raises:
        RuntimeError: if there is none.
    """
    found = attachment.samples.fingerprints(inputs)
    for capture in attachment.pending:
        if torch.equal(capture.placement.fingerprints, found):
            return capture
    raise RuntimeError(
        f"DecoupledDescent: layer {attachment.name!r} ran in the midst of a backward pass, as "
        "reentrant activation checkpointing runs it: its gradient there is not that of the whole "
        "loss. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or leave the "
        "decoupled layer out of what is checkpointed."
    )


def _refuse_replica(layer: nn.Module) -> None:
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "DecoupledDescent: torch.nn.DataParallel replicates the decoupled layer at every "
            "forward, out of the optimizer's sight; use DistributedDataParallel or one device"
        )
