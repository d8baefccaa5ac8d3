"""One decoupled layer: hooked, corrected, read."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from dd.capture import Capture, Pushes, joined
from dd.contribution import Contribution
from dd.curvature import Rows, build
from dd.fingerprint import Fingerprints
from dd.fitted import require_same_order
from dd.functional import (
    all_finite,
    at_least_single,
    correct_preactivation_,
    corrected_preactivation,
)
from dd.gradient_check import (
    Comparison,
    edit_scale,
    edited,
    same_weight,
    scale_of_terms,
    weight_changed,
)
from dd.head import SharedParameters
from dd.head_choice import AUTO, form_to_correct, worth_correcting
from dd.layers import blamed_modules, find_layer
from dd.moments import Moments
from dd.noise import LARGEST_GRAM, NoiseModel
from dd.oversight import Oversight
from dd.ranks import Ranks
from dd.samples import Placement, Samples
from dd.shadows import Shadows
from dd.strain import StrainWarning
from dd.user_warning import warn_user
from dd.verdicts import Verdicts

if TYPE_CHECKING:
    from dd.line_family import Trial
    from dd.optimizer import DecoupledDescent

__all__ = ["UNTRACEABLE", "Attachment", "ForwardHook"]

UNTRACEABLE = (
    "DecoupledDescent looks at every batch and every gradient outside of the graph: compile "
    "without fullgraph=True, or only what lies between the decoupled layer and the loss"
)


class ForwardHook:
    """Passes a layer's forward to the optimizer that owns it, and to no copy of either.

    A deep copy or an unpickled copy of the model gets an inert hook, as does the model itself once
    its optimizer is gone.

    Args:
        optimizer: the owner.
        head: whether the layer is the head and not the decoupled one.

    Attributes:
        left: the weight along the first direction of the fingerprints as the last step left it,
            shape (k,), or None; it outlives the optimizer.
    """

    left: Tensor | None = None

    def __init__(self, optimizer: "DecoupledDescent | None" = None, *, head: bool = False) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._head = head

    @property
    def optimizer(self) -> "DecoupledDescent | None":
        """The optimizer, while it lives."""
        return None if self._optimizer is None else self._optimizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardHook":
        """Return an inert hook."""
        copy = ForwardHook()
        copy.left = self.left
        return copy

    def __reduce__(self) -> tuple[type["ForwardHook"], tuple[()]]:
        """Pickle as an inert hook."""
        return ForwardHook, ()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Return the corrected output, or None to leave it as it is."""
        # The compiler follows this far: nothing interrupts the graph of a copy, or in eval mode.
        if self._optimizer is None or not layer.training:
            return None
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNTRACEABLE)
        return self._correct(layer, args, kwargs, output)

    # The lazy form of torch.compiler.disable, as torch's optimizers use it: the public one imports
    # the whole compiler with this module.
    @_disable_dynamo
    def _correct(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        optimizer = self.optimizer
        if optimizer is None:
            return None
        inputs = args[0] if args else kwargs["input"]
        correct = optimizer._correct_scores if self._head else optimizer._correct
        if not torch.is_inference_mode_enabled():
            return correct(layer, inputs, output)
        # What is remembered of the samples must not be made of inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            return correct(layer, inputs, output)


class Attachment:
    """The bond between an optimizer and one linear layer of a module.

    Attributes:
        module: the model.
        name: dotted name of the layer.
        layer: the decoupled layer.
        weight: its weight.
        noise: the noise model; None until the first training forward fits it.
        pending: the training forwards that the next step consumes.
        samples: recognises the training batches.
        shadows: keeps the shadows of absent samples.
        ranks: the processes that share the training samples.
        oversight: warns where the theory is strained or the component ids are wrong.
        verdicts: conditions of its steps.
        shared: the parameters that all samples share, where they are corrected too.
        head_is_optional: whether nobody asked for that, and it ends where a loop does not allow it.
        noise_of_all: the noise model as given, before the component means were kept out of it.
        now: the samples of the latest training forward.
        trial: what stands in for the training forward while a step is searched for.
        repeats: how often the latest forward was run before with other probes.
        rows_seen: rows that training forwards have brought, for whoever counts them.

    Raises:
        ValueError: if there is no such layer or head, one is attached already, its weight is not a
            plain parameter, or the noise model has another dimension than its input or does not go
            with the head's correction.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: nn.Module | str | None,
        noise: NoiseModel | None,
        curvature: str,
        head: bool | nn.Module | str = False,
        bins: int | None = None,
        process_group: Any = None,
        *,
        searches: bool = False,
    ) -> None:
        self.module = module
        self._bins = bins
        self.name, self.layer = find_layer(module, layer)
        # A head that nobody asked for is corrected as long as the loop allows it.
        self.head_is_optional = head == AUTO
        if noise is not None and noise.is_followed_exactly:
            # Nothing else would be left of such a noise model.
            self.head_is_optional = False
        self.noise_of_all = noise
        if head == AUTO:
            chosen = None
            if bins is None:
                chosen = worth_correcting(module, self.layer, noise, curvature, searches=searches)
            noise, head = chosen or noise, chosen is not None
        elif noise is not None and head is not False and noise.is_in_both_forms:
            noise = form_to_correct(module, self.layer, head, noise, curvature, searches=searches)
        self.has_left_head = False
        self._curvature = curvature
        self.noise = self.given_noise = noise
        self.estimator = build(curvature, noise, module)
        self.pending: list[Capture] = []
        # Not a method of this object, which would then outlive its last reference.
        self.samples = Samples(partial(blamed_modules, module, self.name, self.layer))
        self.shadows = Shadows()
        self.oversight = Oversight()
        self.verdicts = Verdicts()
        self.now: Placement | None = None
        self.rows_seen = 0
        self.trial: Trial | None = None
        self.repeats = 0
        self._process_group = process_group
        self._number_alike: bool | None = None
        # Whether the layers behind were seen to leave R as it is.
        self._shares = False
        self._ranks: Ranks | None = None
        self._handles: list[Any] = []
        directions = None if noise is None else noise.mean_directions
        self.shared = (
            None if head is False else SharedParameters(module, self.layer, head, directions)
        )
        self.weight = self._own_weight()
        if noise is not None and noise.dimension != self.layer.in_features:
            raise ValueError(
                f"DecoupledDescent: the noise model describes {noise.dimension} inputs, but layer "
                f"{self.name!r} takes {self.layer.in_features}; fit it on what this layer receives"
            )
        _require_matching_means(noise, corrects_head=self.shared is not None)
        self._left = self._adopt()

    def _own_weight(self) -> nn.Parameter:
        """The decoupled weight.

        Raises:
            ValueError: if it is not a plain parameter.
        """
        weight = self.layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            raise ValueError(
                f"DecoupledDescent: the weight of layer {self.name!r} must be a trainable "
                "parameter of its own (not frozen, not parametrised, not flattened by FSDP)"
            )
        if type(weight.data) is not Tensor:
            raise ValueError(
                f"DecoupledDescent: the weight of layer {self.name!r} is a "
                f"{type(weight.data).__name__}; fully_shard (FSDP) and tensor parallelism split "
                "the decoupled weight over processes, and every process needs all of it. Use "
                "DistributedDataParallel, or leave this layer out of the sharding."
            )
        return weight

    def require_weight_in_place(self) -> None:
        """Check that the layer still has the parameter that was attached.

        Raises:
            RuntimeError: if it has another.
        """
        if self.layer.weight is not self.weight:
            raise RuntimeError(
                f"DecoupledDescent: layer {self.name!r} has another weight than when the optimizer "
                "was attached (fully_shard, to_empty, a parametrisation or an assignment replaced "
                "it); construct the optimizer afterwards"
            )

    def _adopt(self) -> list[Tensor]:
        """Remove the hooks of optimizers that are gone; return the weights that they left.

        Raises:
            ValueError: if another optimizer is attached.
        """
        left = []
        for key, hook in list(self.layer._forward_hooks.items()):
            if not isinstance(hook, ForwardHook):
                continue
            if hook.optimizer is not None:
                raise ValueError(
                    f"DecoupledDescent: layer {self.name!r} is attached to an optimizer already. "
                    "To go on training use that one; to start anew call detach() on it first."
                )
            del self.layer._forward_hooks[key]
            self.layer._forward_hooks_with_kwargs.pop(key, None)
            if hook.left is not None:
                left.append(hook.left)
        return left

    def _warn_of_orphans(self) -> None:
        """Say so where the weights come from steps whose shadows are gone."""
        assert self.samples.directions is not None
        direction = self.samples.directions[0]
        weight = at_least_single(self.layer.weight.detach())
        now = weight @ direction.to(weight)
        if any(torch.equal(left.to(now), now) for left in self._left):
            warn_user(
                f"DecoupledDescent: layer {self.name!r} was trained by an optimizer that is gone, "
                "and its shadows with it, so that they start at zero: the training error is too "
                "low at first. Load that optimizer's state_dict() to go on from it.",
                UserWarning,
            )
        self._left = []

    def register(self, optimizer: "DecoupledDescent") -> None:
        """Install the forward hooks."""
        hook = self._hook = ForwardHook(optimizer)
        self._handles = [self.layer.register_forward_hook(hook, with_kwargs=True)]
        if self.shared is not None:
            hook = ForwardHook(optimizer, head=True)
            head = self.shared.head
            self._handles.append(head.register_forward_hook(hook, with_kwargs=True))

    def leave_head(self, reason: Exception | str, *, begun: bool) -> None:
        """Correct the head no more, which nobody asked for.

        Before the first step all is as if it had not been chosen, and what over-fits is said; later
        on displacements are given up, and the estimate is in doubt.

        Args:
            reason: why it cannot be followed.
            begun: whether there are displacements.

        Warns:
            StrainWarning: if there are, or the head is large for the samples.
        """
        self._handles.pop().remove()
        self.shared, self.head_is_optional, self.has_left_head = None, False, True
        assert self.given_noise is not None
        if not begun:
            self.given_noise = self.noise_of_all
        assert self.given_noise is not None
        # As many bins as the shadows have, now for all directions.
        if self.given_noise.is_followed_exactly:
            assert self.noise_of_all is not None
            self.given_noise = self.noise_of_all.in_one_bin()
        elif self.given_noise.mean_directions is not None:
            self.given_noise = self.given_noise.spread_over_means()
        self._fit_noise_of_all()
        if not begun:
            self.oversight.look_at_head(self)
            return
        # First, as a warning may be an error.
        self.oversight.doubt("The head, which over-fits, is corrected no more.")
        warn_user(
            "DecoupledDescent: the correction of the head, which was chosen by the sizes of model "
            "and data, ends here: from now on the training error is too low by what the head "
            f"over-fits. Train with head=False from the start, or mend this: {reason}",
            StrainWarning,
        )

    def follow_directions(self, count: int) -> None:
        """Follow as many directions of the decoupled layer as a state does.

        Args:
            count: of directions.

        Raises:
            RuntimeError: if the noise model has no form with as many.
        """
        assert self.shared is not None
        present = None if self.given_noise is None else self.given_noise.mean_directions
        if count == (0 if present is None else present.shape[1]):
            return
        whole, forms = self.noise_of_all, []
        if whole is not None and whole.is_in_both_forms:
            forms = [whole.with_means_apart(), whole.with_every_direction_apart()]
        for form in forms:
            directions = form.mean_directions
            if directions is not None and directions.shape[1] == count:
                self.given_noise = form
                self.shared = SharedParameters(
                    self.module, self.layer, self.shared.head, directions
                )
                self._fit_noise_of_all()
                return
        raise RuntimeError(
            f"DecoupledDescent: the state follows {count} directions of layer {self.name!r}, and "
            "this noise model has no such form. Load a state into an optimizer of the noise model "
            "that it was trained with."
        )

    def _fit_noise_of_all(self) -> None:
        assert self.given_noise is not None
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        self.noise = self.given_noise.to(self.layer.weight.device, dtype)
        components = self.estimator.num_components
        self.estimator = build(self._curvature, self.given_noise, self.module)
        # Settled over all processes.
        self.estimator.num_components = max(components, self.estimator.num_components)
        self.oversight.forget_limit()

    def remove(self) -> None:
        """Take the hooks and everything pending away."""
        self.drop()
        for handle in self._handles:
            handle.remove()

    @property
    def shadowed(self) -> list[tuple[Tensor, str]]:
        """Every parameter with a shadow, and the key of the shadow in its state."""
        parts = [] if self.shared is None else self.shared.parts
        return [(self.layer.weight, "shadow"), *parts]

    @property
    def stalls(self) -> bool:
        """Whether to look at a number waits for work that is queued on a device."""
        return self.weight.is_cuda

    @property
    def ranks(self) -> Ranks:
        """The processes that share the training samples, settled at the first use."""
        if self._ranks is None:
            self._ranks = Ranks(_group(self._process_group, self.module))
        return self._ranks

    def forget(self) -> None:
        """Forget the samples, their noise and the weights that the state belonged to."""
        self.drop()
        self.verdicts = Verdicts()
        self.samples.forget()
        self.shadows.forget()
        self.now = None
        self._number_alike = None
        self.noise = self.given_noise
        if self.shared is not None:
            self.shared.forget()

    def drop(self) -> None:
        """Forget the pending training forwards."""
        for capture in self.pending:
            capture.close()
        self.pending.clear()

    @property
    def has_delivered(self) -> bool:
        """Whether a pending forward has its gradient."""
        return any(capture.gradient is not None for capture in self.pending)

    def drop_abandoned(self) -> None:
        """Forget the forwards whose gradients have been cleared."""
        abandoned = [capture for capture in self.pending if capture.gradient is not None]
        for capture in abandoned:
            capture.close()
            self.pending.remove(capture)

    @contextmanager
    def corrected_in_eval_mode(self) -> Iterator[None]:
        """Put the model in eval mode, but for the correction."""
        layers = [self.layer] if self.shared is None else [self.layer, self.shared.head]
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        for layer in layers:
            # Not train(): parametrised children keep their mode.
            layer.training = True
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def trying(self, trial: "Trial") -> Iterator[None]:
        """Let training forwards be those of a trial."""
        self.trial = trial
        try:
            yield
        finally:
            self.trial = None

    def place(self, inputs: Tensor, state: dict[str, Any], *, binds: bool) -> Placement | None:
        """Find the samples of a training batch; None before the first one with gradients.

        Raises:
            ValueError: if the batch is not a matrix, or not the samples of the noise model.
            RuntimeError: if its samples are not known.
        """
        if inputs.dim() != 2:
            raise ValueError(
                f"DecoupledDescent: layer {self.name!r} must receive one row a sample, shape "
                f"(n, {self.layer.in_features}), in training; got {tuple(inputs.shape)}"
            )
        self.bind(state, inputs.dtype)
        if self.noise is None and state.get("shadow_noise") is not None:
            eigenvalues, multiplicities = state["shadow_noise"]
            self.noise = NoiseModel(eigenvalues, multiplicities)
        if not binds and state.get("shadow") is None:
            return None
        placement = self.samples.place(inputs, self.given_noise, binds=binds)
        known = None if self.given_noise is None else self.given_noise.num_samples
        if known is not None and known != self.samples.count:
            count = self.samples.count
            self.samples.forget()
            raise ValueError(
                f"DecoupledDescent: the noise model knows {known} training samples, but the first "
                f"training forward brought {count}, which are not among them as layer "
                f"{self.name!r} receives them. Fit the noise model on this layer's inputs, feed "
                "all samples, or use optimizer.track(loader)."
            )
        return placement

    def bind(self, state: dict[str, Any], dtype: torch.dtype | None = None) -> None:
        """Take up the samples of a loaded state, where none are known yet.

        Args:
            state: of the decoupled weight.
            dtype: of the inputs, where known.

        Raises:
            ValueError: if they are not those of the noise model in their order.
        """
        values = state.get("shadow_samples")
        if self.samples.known is None and values is not None and not values.is_meta:
            require_same_order(values, self.given_noise, dtype)
            if dtype is not None:
                self.samples.resume(values)

    def preactivation(
        self, placement: Placement | None, output: Tensor, state: dict[str, Any]
    ) -> Tensor:
        """Return R, shape (m, k).

        Raises:
            RuntimeError: if the weight was changed since the last step.
        """
        if placement is None or state.get("shadow") is None:
            return output
        self._require_same_weights(state.get("shadow_weight"))
        count = self.samples.count
        with torch.no_grad():
            if count is not None and self.noise is not None:
                self.shadows.make(state, self.noise, count, output)
            shadow = self.shadows.of(state, placement)
        correct = correct_preactivation_ if self._is_alone_with(output) else corrected_preactivation
        corrected = correct(output, shadow)
        if self.shared is None:
            self.oversight.look_at_shadows(self, shadow.sum(0), corrected)
        return corrected

    @property
    def is_plain(self) -> bool:
        """Whether the layer is one product of its inputs and its weight, seen first from here."""
        layer = self.layer
        return (
            type(layer) is nn.Linear
            and "forward" not in vars(layer)
            and layer._compiled_call_impl is None
            and next(iter(layer._forward_hooks.values()), None) is self._hook
        )

    def _is_alone_with(self, output: Tensor) -> bool:
        """Whether nobody but the layer's own product has seen its output yet."""
        return (
            self.is_plain
            and output.requires_grad
            and not nn.modules.module._global_forward_hooks
            and type(output) is Tensor
            and not output._is_view()
        )

    def _require_same_weights(self, expected: Tensor | None) -> None:
        if expected is None or self.samples.directions is None:
            return
        same = same_weight(self.layer.weight.detach(), self.samples.directions[0], expected)
        message = weight_changed("the decoupled layer's weight")
        self.verdicts.require(same, lambda _: RuntimeError(message))

    def capture(
        self,
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
        self._require_single(placement)
        if not preactivation.requires_grad:
            raise RuntimeError(
                f"DecoupledDescent: the weight of layer {self.name!r} was frozen after attaching; "
                "unfreeze it, or call optimizer.detach() to train the other layers alone"
            )
        if inputs.requires_grad:
            raise RuntimeError(
                f"DecoupledDescent: the input of layer {self.name!r} depends on trainable "
                f"parameters ({self._earlier_parameters()}). The decoupled layer must come first: "
                "freeze what is before it (requires_grad_(False)), or name "
                "another layer with layer=."
            )
        if self._left and not has_shadow:
            self._warn_of_orphans()
        if self.noise is None or self.noise is self.given_noise:
            self._fit_noise(placement, inputs)
        self.oversight.look(self, placement, inputs.detach())
        capture = Capture(
            placement,
            preactivation,
            self.estimator,
            seed,
            shares=self._shares,
            product=product,
            directions=self.samples.directions,
        )
        self.pending.append(capture)
        return self.oversight.outgoing(self, capture, capture.outgoing(preactivation), seed)

    def _require_single(self, placement: Placement) -> None:
        for other in self.pending:
            if other.gradient is not None or not _share_samples(placement, other.placement):
                continue
            raise RuntimeError(
                f"DecoupledDescent: layer {self.name!r} saw two training forwards of the same "
                "samples before a backward (or is used twice in one forward, which is outside the "
                "theory). Run forwards that lead to no step under model.eval() or "
                "torch.no_grad(); after a skipped or interrupted step call "
                "optimizer.drop_forward()."
            )

    def pushes(self) -> Pushes:
        """The rows of all pending forwards, which must have their gradients.

        Raises:
            RuntimeError: if what is needed of them was changed in place.
        """
        count = self.samples.count
        assert count is not None
        self._shares = all(capture.is_intact for capture in self.pending)
        return joined(self.pending, count)

    def pushes_of_all_ranks(self, pushes: Pushes) -> Pushes:
        """The rows whose shadows this rank keeps: where ranks number samples alike, those of all.

        Then a sample may come to any rank, and every rank keeps all shadows. Where each rank knows
        its own samples alone, it keeps theirs.

        Raises:
            RuntimeError: if ranks that do not number alike know the same samples.
        """
        if self.ranks.size == 1:
            return pushes
        assert self.samples.known is not None
        if self._ranks_number_alike():
            return pushes.gathered(self.ranks, len(self.samples.known))
        self._require_own_samples(self.samples.known)
        return pushes

    def _require_own_samples(self, known: Fingerprints) -> None:
        fresh = known.take_fresh()
        if self.ranks.largest(len(fresh), fresh.device) == 0:
            return
        ranks = fresh.new_full((len(fresh), 1), float(self.ranks.rank))
        everyone = self.ranks.gather(torch.cat([ranks, fresh], 1))
        others = everyone[everyone[:, 0] != self.ranks.rank, 1:]
        shared = int(known.find(others)[1].sum()) if len(others) else 0
        if self.ranks.largest(shared, fresh.device):
            raise RuntimeError(
                "DecoupledDescent: samples of one process came to another, away from their "
                "shadows. Construct with the same noise=dd.NoiseModel.fit(inputs) of all training "
                "samples on every process, after which any may get any sample; or give each "
                "process its own samples, and noise.of(rows)."
            )

    def _ranks_number_alike(self) -> bool:
        """Whether all ranks know the same samples in one order; settled at the first step."""
        if self._number_alike is None:
            assert self.samples.known is not None
            known = self.samples.known.values.double()
            weights = torch.arange(1, len(known) + 1, device=known.device).double()
            # Unseen samples are no numbers, so that ranks with other ones seen do not agree.
            seen = (~known.isnan()).double()
            sums = torch.stack([weights @ known.nan_to_num(), weights @ seen])
            self._number_alike = self.ranks.agree(sums)
        return self._number_alike

    def seen_terms(self) -> list[Contribution]:
        """All terms of the weight's gradient, or none where one was not seen being made.

        Nor on several processes, which add their terms up: all must look at the same.
        """
        terms = [c.contribution for c in self.pending if c.contribution is not None]
        return terms if self.ranks.size == 1 and len(terms) == len(self.pending) else []

    def edit_scale(self, pushes: Pushes) -> float | Tensor:
        """By which scale the weight's gradient was edited since the backward pass.

        Returns:
            The scale; a tensor of shape () on the device where it is not known yet.

        Raises:
            RuntimeError: if it was edited otherwise.
        """
        weight, directions = self.layer.weight, self.samples.directions
        assert weight.grad is not None
        assert directions is not None
        projections, terms = pushes.placement.fingerprints, self.seen_terms()
        compared = weight.grad, pushes.gradient, directions, projections, self.ranks
        if not self.verdicts.defers:
            if terms:
                return scale_of_terms(weight.grad, terms, directions)
            return edit_scale(*compared)
        if terms:
            found = Comparison.of_terms(weight.grad, terms, directions)
        else:
            found = Comparison.of(*compared, scaled=True)
        is_same, (scale, is_multiple) = found.is_same(), found.multiple
        self.verdicts.require(is_same | is_multiple, lambda _: RuntimeError(edited(self.ranks)))
        return torch.where(is_same, 1.0, scale)

    def curvature(self, pushes: Pushes, scale: float | Tensor, state: dict[str, Any]) -> Tensor:
        """Estimate H of this step's loss, small batches pooled with the steps before.

        Args:
            pushes: the step's rows.
            scale: of the step's gradient over that of the backward pass.
            state: of the decoupled weight.

        Returns:
            H, shape (k, k).

        Raises:
            FloatingPointError: if the second derivative is not finite.
            RuntimeError: if there are too few samples.
        """
        estimator = self.estimator
        product, index = pushes.product(), pushes.placement.index
        if not isinstance(scale, Tensor) and scale != 1.0:
            # Sums over a scaled loss may be infinite.
            product = scale * at_least_single(product)
        pools = self.ranks.size > 1 or state.get("shadow_moments") is not None
        gradient = pushes.gradient
        if not isinstance(scale, Tensor) and scale != 1.0:
            gradient = scale * at_least_single(gradient)
        rows = Rows(
            pushes.observed, product, index, self.ranks, pushes.preactivation, gradient, pools
        )
        moments = estimator.moments(rows)
        if isinstance(scale, Tensor):
            moments = moments.scaled(scale.to(moments.cross))
        found, kept = self._pooled(moments, pushes, scale, state)
        self._require_resolved(moments, found, pushes.gradient)
        if kept is not None:
            self._keep_moments(state, kept)
        return found

    def _pooled(
        self, moments: Moments, pushes: Pushes, scale: float | Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, Moments | None]:
        """H of a step's moments and those of the steps before, and what to keep for the next."""
        estimator, width = self.estimator, pushes.gradient.shape[1]
        if estimator.pooled_rows == 0:
            return estimator.solve(moments), None
        keep = self._keep(moments, len(pushes.gradient), width)
        alone = pushes.placement.index is None and self.ranks.size == 1
        if keep == 0.0 and alone and state.get("shadow_moments") is None:
            # Nothing to pool with, nor likely to be pooled with what follows.
            return estimator.solve(moments), None
        # Steps of other loss scales and gradient scales are pooled in the unit of their gradients.
        unit = self._gradient_size(pushes, scale)
        scaled = moments.scaled(1 / unit)
        if keep == 0.0:
            return estimator.solve(moments), scaled
        earlier = _unpacked(state.get("shadow_moments"), estimator.num_components, width)
        if earlier is not None:
            scaled = estimator.pooled(scaled, earlier, keep)
        return estimator.solve_pooled(scaled.scaled(unit)), scaled

    def _require_resolved(self, moments: Moments, curvature: Tensor, gradient: Tensor) -> None:
        num_samples, dtype = len(gradient), gradient.dtype

        def explain(_: list[bool]) -> Exception:
            if not moments.is_finite:
                return self._curvature_overflows(dtype)
            return RuntimeError(
                f"DecoupledDescent: {num_samples} samples do not resolve the curvature of the "
                f"{len(curvature)} units of layer {self.name!r}; use fewer units or more samples, "
                'or give component ids for curvature="stein"'
            )

        # Of moments that overflow, Σ a bᵀ shows in H, and Σ a aᵀ may leave it zero.
        self.verdicts.require(all_finite(moments.gram, curvature), explain)

    def _keep_moments(self, state: dict[str, Any], moments: Moments) -> None:
        packed, refusal = moments.packed(), self.verdicts.refusal
        if refusal is not None:
            before = state.get("shadow_moments")
            if before is None or before.shape != packed.shape:
                before = torch.zeros_like(packed)
            packed = torch.where(refusal > 0, before, packed)
        state["shadow_moments"] = packed

    def _curvature_overflows(self, dtype: torch.dtype) -> FloatingPointError:
        """What to say where the second derivative is not finite.

        Args:
            dtype: of the gradient, which tells of autocast.
        """
        parameters = [parameter.detach() for parameter in self.module.parameters()]
        largest = max(float(p.abs().max()) for p in parameters if p.numel() > 0)
        precisions = {dtype, *(parameter.dtype for parameter in parameters)}
        half = torch.float16 in precisions
        return FloatingPointError(
            f"DecoupledDescent: the curvature at layer {self.name!r} is not finite, though the "
            "gradient is; nothing was updated. Likely causes: the learning rate is too large "
            f"(halve it; the largest weight is {largest:.2g})"
            + (", half precision that overflows" if half else "")
            + ", or a loss whose second derivative is infinite at some sample."
        )

    def _gradient_size(self, pushes: Pushes, scale: float | Tensor) -> Tensor:
        """Σ_i ‖g_i‖ over all ranks, shape ()."""
        gradient = at_least_single(pushes.gradient)
        if not isinstance(scale, Tensor) and scale != 1.0:
            gradient = scale * gradient
        size = self.ranks.sum(torch.linalg.vector_norm(gradient, dim=1).sum())
        if isinstance(scale, Tensor):
            size = scale.abs().to(size) * size
        return size.clamp_min(torch.finfo(size.dtype).tiny)

    def _keep(self, moments: Moments, rows: float, width: int) -> float:
        """Weight of the moments of the steps before: none where a step holds enough samples."""
        total = self.samples.total(self.given_noise)
        if self.ranks.size > 1:
            # Every rank must come to the same curvature.
            rows = float(moments.rows)
            if not self._ranks_number_alike():
                total = float(self.ranks.sum(moments.rows.new_tensor(total)))
        return max(0.0, 1.0 - rows / min(total, self.estimator.pooled_rows * width))

    def remember_samples(self, state: dict[str, Any]) -> None:
        """Put into the state of the decoupled weight what tells its samples and their noise."""
        assert self.samples.known is not None
        state["shadow_samples"] = self.samples.known.values
        if self.given_noise is None and self.noise is not None:
            values = self.noise.eigenvalues
            state["shadow_noise"] = torch.stack([values, self.noise.multiplicities.to(values)])

    def remember_weight(self, state: dict[str, Any]) -> None:
        """Remember the weights that a step leaves, in the state of the decoupled one."""
        if self.samples.directions is not None:
            weight = at_least_single(self.layer.weight.detach())
            along = weight @ self.samples.directions[0].to(weight)
            state["shadow_weight"] = self._hook.left = along
        if self.shared is not None:
            self.shared.remember_weight()

    def _fit_noise(self, placement: Placement, inputs: Tensor) -> None:
        noise = self.given_noise
        if noise is None:
            inputs = self.ranks.gather(self._all_inputs(placement, inputs.detach()))
            large = min(inputs.shape) > LARGEST_GRAM
            noise = (
                NoiseModel.isotropic(inputs) if large else NoiseModel.fit(inputs, bins=self._bins)
            )
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        self.noise = noise.to(self.layer.weight.device, dtype)
        if self.ranks.size > 1:
            self._settle_ranks(self.noise)

    def _settle_ranks(self, noise: NoiseModel) -> None:
        """Make sure that all ranks correct alike.

        Raises:
            ValueError: if their noise models differ.
        """
        bins = len(noise.eigenvalues)
        if self.ranks.largest(bins, noise.mass.device) != bins or not self.ranks.agree(
            torch.cat([noise.eigenvalues, noise.mass])
        ):
            raise ValueError(
                "DecoupledDescent: the processes have different noise models. Fit one on all "
                "training samples in every process, and give each noise.of(rows), the rows it "
                "trains on."
            )
        count = self.ranks.largest(self.estimator.num_components, noise.mass.device)
        self.estimator.num_components = count

    def _all_inputs(self, placement: Placement, inputs: Tensor) -> Tensor:
        """Inputs of all samples in their order.

        Raises:
            ValueError: if the batch does not hold all.
        """
        whole = not math.isinf(self.samples.total(None))
        if whole and (placement.rows is None or placement.index is None):
            return inputs
        if whole and placement.rows is not None and len(placement.rows) == self.samples.count:
            ordered = torch.empty_like(inputs[: len(placement.rows)])
            ordered[placement.index] = inputs
            return ordered
        self.samples.release()
        raise ValueError(
            "DecoupledDescent: a mini-batch does not show the noise of the training set. "
            "Construct with noise=dd.NoiseModel.fit(inputs, components), the inputs of all "
            "training samples as the decoupled layer receives them; components are optional."
        )

    def _earlier_parameters(self) -> str:
        names = []
        for name, parameter in self.module.named_parameters():
            if parameter is self.layer.weight:
                break
            if parameter.requires_grad:
                names.append(name)
        return ", ".join(names[:4]) or "or requires a gradient itself"


def _unpacked(numbers: Tensor | None, count: int, width: int) -> Moments | None:
    return None if numbers is None else Moments.unpacked(numbers, count, width)


def _share_samples(one: Placement, other: Placement) -> bool:
    if one.rows_on_cpu is None or other.rows_on_cpu is None:
        return True
    return bool(torch.isin(one.rows_on_cpu, other.rows_on_cpu).any())


def _group(choice: Any, module: nn.Module) -> Any:
    """The process group that trains a module, or None for this process alone."""
    if choice is False:
        return None
    if choice is not None:
        return choice
    if isinstance(module, DistributedDataParallel):
        return module.process_group
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.group.WORLD if distributed.get_world_size() > 1 else None


def _require_matching_means(noise: NoiseModel | None, *, corrects_head: bool) -> None:
    if noise is None:
        return
    separated = noise.mean_directions is not None
    if corrects_head and noise.components is not None and not separated:
        raise ValueError(
            "DecoupledDescent: head=True follows the decoupled layer along the component means by "
            "itself; keep them out of the noise model: NoiseModel.fit(inputs, components, "
            "separate_means=True)"
        )
    if separated and not corrects_head:
        raise ValueError(
            "DecoupledDescent: this noise model leaves out the directions of the component means, "
            "which only head=True follows; use head=True, or NoiseModel.fit without separate_means"
        )
