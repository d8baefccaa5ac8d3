"""The bond to one model: its hooks, its pending forwards, what belongs to its samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.capture import Capture
from dd.correction.head import SharedParameters
from dd.correction.head_choice import (
    AUTO,
    form_and_head,
    form_without_head,
    require_matching_means,
    uncorrected_count,
)
from dd.correction.hook import Correct, Forward, ForwardHook, OutputHook, sweep, take_over
from dd.correction.layers import find_layers, input_changing_modules
from dd.correction.shadows import KeptShadows, Shadows
from dd.curvature.choice import build
from dd.functional import at_least_single
from dd.noise.model import NoiseModel
from dd.samples.placement import Placement
from dd.samples.several_rows import SamplesOfRows
from dd.support.fingerprint import directions
from dd.support.ranks import Ranks, training_group
from dd.watch.deferred_checks import DeferredChecks
from dd.watch.model_watch import ModelWatch, WatchedModel
from dd.watch.readers import InputReaders

__all__ = ["Attachment"]


class Attachment:
    """The bond between an optimizer and one linear layer of a module.

    Args:
        module: the model.
        layer: the decoupled layer, its dotted name, a list of several that read the same inputs, or
            None for the first linear one.
        noise: the noise model, or None.
        curvature: name of the estimator.
        head: whether the head is corrected, which layer it is, or "auto".
        bins: most eigenvalues of a noise model that is fitted here; None: as many as it takes.
        process_group: that shares the samples; None for the default one, False for none.
        searches: whether steps are searched for.
        shadows: keeps the shadows; by default those that SGD moves.

    Attributes:
        module: the model.
        curvature: name of the estimator.
        name: dotted name of the layer.
        layer: the decoupled layer, the first of several.
        weight: its weight, whose state holds the shadows.
        layers: all of them.
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
        bins: most eigenvalues of a noise model that is fitted here, or None.
        shares: whether what captures keep of R need not be copied: the layers behind were seen to
            leave it as it is.
        orphans: weights as optimizers that were attached before left them.
        is_taken: whether another optimizer has been attached to the layer since.
        now: the samples of the latest training forward.
        trial: what stands in for the training forward for a while, or None.
        searches: whether steps are searched for.
        repeats: how often the latest forward was run before with other probes.
        rows_seen: rows that training forwards have brought, for whoever counts them.

    Raises:
        ValueError: if there is no such layer or head, its weight is not a
            plain parameter, or the noise model has another dimension than its input or does not go
            with the head's correction.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: Any,
        noise: NoiseModel | None,
        curvature: str,
        head: bool | nn.Module | str = False,
        *,
        bins: int | None = None,
        process_group: Any = None,
        searches: bool = False,
        shadows: KeptShadows | None = None,
    ) -> None:
        self.module = module
        self.bins = bins
        self.layers = find_layers(module, layer)
        self.name, self.layer = self.layers.names[0], self.layers.layers[0]
        if self.layers.are_several and head == AUTO:
            head = False
        # A head that nobody asked for is corrected as long as the loop allows it.
        self.head_is_optional = head == AUTO
        if noise is not None and noise.is_followed_exactly:
            # Nothing else would be left of such a noise model.
            self.head_is_optional = False
        self.noise_of_all = noise
        noise, head = form_and_head(
            module, self.layer, noise, head, curvature, may_choose=bins is None, searches=searches
        )
        self.has_left_head = False
        self.curvature = curvature
        self.noise = self.given_noise = noise
        self.estimator = build(curvature, noise, module)
        self.pending: list[Capture] = []
        # Not a method of this object, which would then outlive its last reference.
        self.samples = SamplesOfRows(partial(input_changing_modules, module, self.name, self.layer))
        self.shadows = Shadows() if shadows is None else shadows
        self.oversight = ModelWatch()
        self.verdicts = DeferredChecks()
        self.now: Placement | None = None
        self.rows_seen = 0
        self.trial: Forward | None = None
        self.repeats = 0
        self._process_group, self.searches = process_group, searches
        self._number_alike: bool | None = None
        self.shares = False
        self._ranks: Ranks | None = None
        self._handles: list[Any] = []
        self._hook: ForwardHook | None = None
        self._at_head: Any = None
        means = None if noise is None else noise.mean_directions
        self.shared = None if head is False else SharedParameters(module, self.layer, head, means)
        self.weight = self.layers.own_weights()[0]
        if noise is not None and noise.dimension != self.layer.in_features:
            raise ValueError(
                f"DecoupledDescent: the noise model describes {noise.dimension} inputs, but layer "
                f"{self.name!r} takes {self.layer.in_features}; fit it on what this layer receives"
            )
        require_matching_means(noise, corrects_head=self.shared is not None)
        self.orphans: list[Tensor] = []
        self.is_taken = False

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

    def register(self, at_layer: Correct, at_head: Correct) -> None:
        """Install the forward hooks, in place of those of any optimizer attached before.

        Args:
            at_layer: method that corrects the output of the decoupled layer.
            at_head: method that corrects the output of the head.
        """
        self.orphans = take_over(self.layer)
        self._hook = ForwardHook(at_layer, self.give_up)
        self._handles = [self._hooked(layer) for layer in self.layers.layers]
        sweep(self.module)
        self._readers = InputReaders(self.module, self.layers.layers, self.layers.names, self.join)
        self._handles += self._readers.register()
        if self.module is not self.layer:
            self._handles.append(self.module.register_forward_hook(OutputHook(self.marked)))
        if self.shared is not None:
            hook, head = ForwardHook(at_head), self.shared.head
            self._at_head = head.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(self._at_head)

    def let_go_with(self, handle: Any) -> None:
        """Remove something else with the hooks, by its method ``remove()``."""
        self._handles.append(handle)

    def _hooked(self, layer: nn.Linear) -> Any:
        assert self._hook is not None
        return layer.register_forward_hook(self._hook, with_kwargs=True)

    def join(self, name: str, layer: nn.Linear) -> bool:
        """Decouple another layer of the same inputs too; returns whether all in use allows it."""
        plain = self.bins is None and not self.searches and self.shadows.follows_layers
        follows = plain and self.ranks.size == 1 and (self.shared is None or self.head_is_optional)
        if follows:
            if self.shared is not None:
                self.release_head(begun=False)
            self.layers.join(name, layer)
            self._handles.append(self._hooked(layer))
        return follows

    def take_given_noise(self) -> None:
        """Go by the noise model that is given now, for all samples."""
        assert self.given_noise is not None
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        self.noise = self.given_noise.to(self.layer.weight.device, dtype)
        components = self.estimator.num_components
        self.estimator = build(self.curvature, self.given_noise, self.module)
        # Settled over all processes.
        self.estimator.num_components = max(components, self.estimator.num_components)
        self.oversight.forget_limit()

    def release_head(self, *, begun: bool) -> None:
        """Take away the hook at the head, and all that is kept of it.

        Args:
            begun: whether there are displacements; else all is as if it had not been chosen.
        """
        if self._at_head is not None:
            self._at_head.remove()
        self.shared, self.head_is_optional, self.has_left_head = None, False, True
        noise = self.given_noise if begun else self.noise_of_all
        self.given_noise = form_without_head(noise, self.noise_of_all)
        self.take_given_noise()

    @property
    def direction(self) -> Tensor:
        """Of the inputs, along which weights are known again, shape (d,)."""
        if self.samples.directions is not None:
            return self.samples.directions[0]
        return directions(self.layer.in_features)[0].to(self.weight.device)

    def along(self, weight: Tensor) -> Tensor:
        """What a weight is known again by, or a tensor of its shape (k, d); shape (k,)."""
        found = at_least_single(weight.detach())
        return found @ self.direction.to(found)

    @property
    def subject(self) -> WatchedModel:
        """What is trained here, for those who watch."""
        return WatchedModel(
            module=self.module,
            layer=self.layer,
            name=self.name,
            noise=self.noise,
            given_noise=self.given_noise,
            estimator=self.estimator,
            samples=self.samples,
            total=self._total,
            stalls=self.stalls,
            width=self.layers.width,
            corrected=0 if self.shared is None else self.shared.count,
            uncorrected=self._uncorrected,
        )

    def _total(self) -> int | None:
        """Number of training samples over all processes, or None before it is known."""
        count = self.samples.count
        return None if count is None else count * self.ranks.size

    def _uncorrected(self) -> int:
        """Trained numbers that all samples share and that are not corrected."""
        corrected = {id(parameter) for parameter, _ in self.shadowed}
        corrected |= {id(layer.weight) for layer in self.layers.layers}
        return uncorrected_count(self.module, self.layer, self.noise, corrected)

    def marked(self, output: Tensor) -> Tensor:
        """An output of the model that leads to the loss of a pending forward."""
        if not (output.requires_grad and torch.is_grad_enabled() and self.pending):
            return output
        rows = len(self.pending[-1].placement.fingerprints)
        if self.noise is None or self.noise.units is None:
            self.oversight.look_at_output(self.subject, rows, output)
        is_lost = type(output) is Tensor and self.estimator.records
        return self.pending[0].outgoing(output) if is_lost else output

    def give_up(self) -> None:
        """Leave the layer to another optimizer."""
        self.remove()
        self.is_taken = True

    def require_own(self) -> None:
        """Check that no other optimizer has been attached to the layer since.

        Raises:
            RuntimeError: if one has.
        """
        if self.is_taken:
            raise RuntimeError(
                f"DecoupledDescent: another optimizer was attached to layer {self.name!r} after "
                "this one, whose shadows know nothing of its steps; go on with that one, or call "
                "detach() on this one to use it as plain SGD"
            )

    def remove(self) -> None:
        """Take the hooks and everything pending away."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        if self._hook is not None:
            self._hook.let_go(self.layer)

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
            self._ranks = Ranks(training_group(self._process_group, self.module))
        return self._ranks

    def forget(self) -> None:
        """Forget the samples, their noise and the weights that the state belonged to."""
        self.drop()
        self.verdicts = DeferredChecks()
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
        self.layers.drop()

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

    def drop_cleared(self) -> None:
        """Forget the same, and the conditions of a step to which nothing leads any more."""
        self.drop_abandoned()
        if not self.pending:
            self.verdicts.withdraw()

    @contextmanager
    def trying(self, trial: Forward) -> Iterator[None]:
        """Let training forwards be those of a trial."""
        self.trial = trial
        try:
            yield
        finally:
            self.trial = None

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

    def holds_all(self, placement: Placement) -> bool:
        """Whether a batch holds the samples of all processes, in their order."""
        return placement.index is None and self.ranks.size == 1

    def ranks_number_alike(self) -> bool:
        """Whether all ranks know the same samples in one order; settled at the first step."""
        if self._number_alike is None:
            assert self.samples.known is not None
            self._number_alike = self.ranks.agree_on_rows(self.samples.known.values)
        return self._number_alike

    def remember_samples(self, state: dict[str, Any]) -> None:
        """Put into the state of the decoupled weight what tells its samples and their noise."""
        assert self.samples.known is not None
        state["shadow_samples"] = self.samples.known.values
        if self.given_noise is None and self.noise is not None:
            values = self.noise.eigenvalues
            state["shadow_noise"] = torch.stack([values, self.noise.multiplicities.to(values)])

    def remember_weight(self, state: dict[str, Any]) -> None:
        """Remember the weights that a step leaves, in the state of the decoupled one."""
        state["shadow_weight"] = along = self.along(self.layers.weight)
        if self._hook is not None:
            self._hook.left = along
        if self.shared is not None:
            self.shared.remember_weight()
