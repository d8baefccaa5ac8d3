"""Decoupled descent as a drop-in replacement for :class:`torch.optim.SGD`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from dd.attachment import Attachment
from dd.capture import Pushes
from dd.curvature import check_name
from dd.divergence import DivergenceWatch, SharpnessWatch
from dd.functional import damped_weight_gradient
from dd.loaders import tracked
from dd.noise import NoiseModel
from dd.ranks import Ranks
from dd.samples import Placement
from dd.shadows import ShadowUpdate, keeping

__all__ = ["DecoupledDescent"]

_RATE_ROUNDING = 1e-12
_SETTINGS = ("_curvature", "_damping", "_head", "_seed")


class DecoupledDescent(torch.optim.SGD):
    """Gradient descent whose training loss is, at every step, an estimate of the test loss.

    Lovig, arXiv 2604.27883. Given a module, it attaches itself to the first linear layer: in train
    mode the layer's output is the corrected pre-activation R = XW + Q, where the shadow Q removes
    from each sample the imprint that it left on the weights. In eval mode the network is the plain
    one. Given parameters, it is ``torch.optim.SGD`` until :meth:`attach` is called.

    A training forward may hold the whole training set or a mini-batch of it. Its samples are known
    by their inputs where ``noise`` was fitted on them or an earlier forward held all of them;
    otherwise :meth:`track` or :meth:`batch` tells which they are.

    Args:
        params: a module, or whatever ``torch.optim.SGD`` takes.
        lr: learning rate, finite and not negative.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coupled L2 penalty.
        nesterov: use Nesterov momentum.
        layer: the decoupled layer or its dotted name; by default the first ``nn.Linear`` with
            trainable weights.
        noise: covariance of the inputs within mixture components, and the components where they
            are known; by default fitted on the first training batch, without components, and
            isotropic where that batch is too large for its spectrum (min(n, d) beyond 20 000).
        curvature: estimator of the loss's curvature in the pre-activations: ``"auto"`` (Stein where
            ``noise`` knows the components, else the probe), ``"stein"``, ``"probe"``,
            ``"probe_create_graph"`` or ``"exact"``; the last two need
            ``loss.backward(create_graph=True)``.
        damping: ρ in [0, 1]; 1 updates W as gradient descent does, less removes a share of the
            drift (isotropic noise only).
        head: whether the network's last linear layer (True), or the one given or named, is
            corrected for its own over-fitting too, and with it the decoupled layer's bias and its
            weights along the component means; for softmax cross-entropy. Takes n p numbers and
            n p² operations a step, p the number of these weights.
        seed: of the curvature probes; the global generators are left alone.
        decoupled_weight_decay: shrink the parameters by lr · weight_decay themselves, outside of
            momentum (Loshchilov and Hutter 2019), instead of adding the decay to the gradient.
        process_group: processes that share one training run, each with its own samples; by default
            that of a ``DistributedDataParallel`` module, else the default group where
            ``torch.distributed`` is initialised. False: this process trains alone.
        maximize: ascend instead of descend.
        foreach: as in ``torch.optim.SGD``.
        differentiable: as in ``torch.optim.SGD``; only while unattached.
        fused: as in ``torch.optim.SGD``.

    Raises:
        ValueError: if an argument is out of range, or the module has no layer to decouple.
        TypeError: if ``layer`` is not an ``nn.Linear``.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        layer: nn.Module | str | None = None,
        noise: NoiseModel | None = None,
        curvature: str = "auto",
        damping: float = 1.0,
        head: bool | nn.Module | str = False,
        seed: int = 0,
        decoupled_weight_decay: bool = False,
        process_group: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        # Not on the class: a wrapper that inherits from it would see those instead of its own.
        self._attachment: Attachment | None = None
        self._watch: DivergenceWatch | None = None
        self._edge: SharpnessWatch | None = None
        _check_rate(lr)
        if not 0.0 <= damping <= 1.0:
            raise ValueError(f"DecoupledDescent: damping must lie in [0, 1], got {damping}")
        check_name(curvature)
        module = params if isinstance(params, nn.Module) else None
        if module is None and (layer is not None or noise is not None):
            raise ValueError(
                "DecoupledDescent: layer= and noise= need a module; pass the module in place of "
                "its parameters, or give them to attach(module, layer=..., noise=...)"
            )
        super().__init__(
            params.parameters() if isinstance(params, nn.Module) else params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._curvature = curvature
        self._damping = damping
        self._head = head
        self._seed = int(seed)
        self._process_group = process_group
        self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)
        if module is not None:
            self.attach(module, layer=layer, noise=noise)

    @property
    def layer(self) -> nn.Linear | None:
        """The decoupled layer, or None while unattached."""
        return None if self._attachment is None else self._attachment.layer

    @property
    def noise(self) -> NoiseModel | None:
        """The noise model in use, or None while unattached or before the first step fits one."""
        return None if self._attachment is None else self._attachment.noise

    @property
    def shadow(self) -> Tensor | None:
        """Q, shape (bins, n, k), or None while unattached or before the first step."""
        layer = self.layer
        if layer is None:
            return None
        self._flush()
        return self.state[layer.weight].get("shadow")

    @property
    def needs_graph(self) -> bool:
        """Whether a step needs ``loss.backward(create_graph=True)``."""
        return self._attachment is not None and self._attachment.estimator.second_order

    def attach(
        self,
        module: nn.Module,
        *,
        layer: nn.Module | str | None = None,
        noise: NoiseModel | None = None,
    ) -> None:
        """Decouple a linear layer of ``module``; its parameters must be this optimizer's.

        The shadows start at zero, which is right for weights that have not seen the training
        samples: attach before the first step on them. Shadows that a loaded or unpickled state
        holds are taken up.

        Args:
            module: the model whose training forwards lead to this optimizer's steps.
            layer: as in the constructor.
            noise: as in the constructor.

        Raises:
            ValueError: if this optimizer or the layer is attached already, there is no layer to
                decouple, its weight is not among the optimizer's parameters, or the noise model
                does not fit it.
            TypeError: if ``layer`` is not an ``nn.Linear``.
        """
        if self._attachment is not None:
            raise ValueError(
                f"DecoupledDescent: attached to layer {self._attachment.name!r} already; call "
                "detach() before attaching again"
            )
        bins = None if self._damping == 1.0 else 1
        attachment = Attachment(
            module, layer, noise, self._curvature, self._head, bins, self._process_group
        )
        for parameter, _ in attachment.shadowed:
            self._require_own(attachment, parameter)
        if noise is not None and len(noise.eigenvalues) > 1 and self._damping != 1.0:
            raise ValueError(
                f"DecoupledDescent: damping={self._damping} is defined for isotropic noise, got a "
                f"noise model of {len(noise.eigenvalues)} bins; use damping=1 or "
                "NoiseModel.isotropic"
            )
        if self._head is not False and self._damping != 1.0:
            raise ValueError("DecoupledDescent: head=True needs damping=1")
        if any(group["differentiable"] for group in self.param_groups):
            raise ValueError("DecoupledDescent: differentiable=True works only while unattached")
        attachment.register(self)
        self._attachment = attachment
        # A gradient scaler must not leave the skipping of a step to the fused update.
        self._step_supports_amp_scaling = False

    def detach(self) -> None:
        """Remove every trace from the module; from here on this is ``torch.optim.SGD``."""
        if self._attachment is not None:
            self._attachment.remove()
        for state in self.state.values():
            for key in [k for k in state if _is_own(k)]:
                del state[key]
        self._attachment = self._watch = self._edge = None
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)

    def track(self, loader: Any) -> Any:
        """Tell the optimizer which samples every batch of a loader holds.

        Needed for mini-batches of samples that the noise model was not fitted on.

        Args:
            loader: a ``torch.utils.data.DataLoader`` over a map-style dataset, or any sized
                iterable of batches of sample indices.

        Returns:
            An iterable of the same batches in the same form; iterate over it in place of
            ``loader``.

        Raises:
            ValueError: if unattached, or the loader's samples have no fixed index.
            TypeError: if the loader is neither.
        """
        return tracked(loader, self._required("track()").samples)

    @_disable_dynamo
    def batch(self, indices: Any) -> None:
        """Tell which samples the next training forward holds.

        Args:
            indices: integers from 0, one a row, shape (m,).

        Raises:
            ValueError: if unattached, or the indices are not integers in range.
        """
        samples = self._required("batch()").samples
        samples.withdraw()
        samples.announce(torch.as_tensor(indices))

    @_disable_dynamo
    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Mean of the corrected loss over batches, an estimate of the test loss; changes nothing.

        The model is in eval mode, but for the correction.

        Args:
            batches: training samples, such as the loader used in training.
            loss: takes a batch, runs the model on it once, and returns the mean loss over its
                samples, or several means in one tensor, such as loss and error.

        Returns:
            The mean over all samples, of the shape that ``loss`` returns.

        Raises:
            ValueError: if unattached, or there are no batches.
            RuntimeError: if a batch did not pass through the decoupled layer.
        """
        attachment = self._required("evaluate()")
        total, rows = torch.zeros(()), 0.0
        with attachment.corrected_in_eval_mode():
            for batch in batches:
                attachment.rows_seen = 0
                value = loss(batch)
                if attachment.rows_seen == 0:
                    raise RuntimeError(
                        f"DecoupledDescent: a batch did not pass through layer {attachment.name!r} "
                        "in evaluate(); let loss(batch) run the model"
                    )
                total = total + attachment.rows_seen * value.detach()
                rows += attachment.rows_seen
        attachment.samples.withdraw()
        if rows == 0:
            raise ValueError("DecoupledDescent: evaluate() got no batches")
        ranks = attachment.ranks
        return ranks.sum(total) / ranks.sum(torch.as_tensor(rows, device=total.device))

    @_disable_dynamo
    def drop_forward(self) -> None:
        """Forget training forwards that will get no step, after a skipped or interrupted one."""
        if self._attachment is not None:
            self._attachment.drop()
            self._attachment.samples.release()
            if self._read(self._attachment.layer.weight, "shadow") is None:
                self._attachment.forget()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forwards whose backward has run but whose step was skipped.

        Args:
            set_to_none: as in ``torch.optim.SGD``.
        """
        if self._attachment is not None:
            self._attachment.drop_abandoned()
        super().zero_grad(set_to_none)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the shadows of all samples up to date."""
        self._flush()
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, shadows included, and forget pending training forwards.

        Args:
            state_dict: of an optimizer attached to the same layer and samples, or unattached.
        """
        given = [state_dict]
        # Last of the hooks that may exchange the state for another.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.append(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._restore_values(given[-1])
        if self._attachment is not None:
            self._attachment.forget()
            self._watch = self._edge = None

    def _restore_values(self, state_dict: dict[str, Any]) -> None:
        # The base class casts every tensor of a state to the parameter's precision, or shares it
        # with the optimizer that it came from: the momentum would then move with both, apart from
        # the shadow's.
        saved = [p for group in state_dict["param_groups"] for p in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            given = state_dict["state"].get(key, {})
            for name, value in given.items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if _is_own(name) else self.state[parameter][name].dtype
                    value = value.to(parameter.device, dtype, copy=True)
                    self.state[parameter][name] = value

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: the settings, and the module that this is attached to."""
        self._flush()
        bond = None
        if self._attachment is not None:
            attachment = self._attachment
            bond = (attachment.module, attachment.name, attachment.given_noise)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        # A process group belongs to its process; to train alone is a choice.
        settings["_process_group"] = False if self._process_group is False else None
        return {**super().__getstate__(), "_bond": bond, "_own_settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and attach it to the copy of the module.

        Args:
            state: as :meth:`__getstate__` returns it.
        """
        state = dict(state)
        bond, settings = state.pop("_bond", None), state.pop("_own_settings", None)
        if settings is not None:
            self._attachment = self._watch = self._edge = None
            vars(self).update(settings)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", False)
        if bond is not None:
            module, layer, noise = bond
            self.attach(module, layer=layer, noise=noise)

    # A compiled step would keep some of the first one's shadows for good.
    @_disable_dynamo
    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update parameters and shadows.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: if a learning rate is negative or not finite.
            RuntimeError: if attached and no training forward and backward came before, the weight
                gradient is not the one they delivered, the curvature could not be had, or a CUDA
                graph is captured.
            FloatingPointError: if attached and a gradient is not finite; nothing is changed.

        Warns:
            DivergenceWarning: once, if the correction has begun to feed back on itself.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is None and self._has_no_gradient():
                # A closure that skipped its batch.
                self.drop_forward()
        for group in self.param_groups:
            _check_rate(group["lr"])
        if self._attachment is None:
            self._require_no_shadow()
            self._step_groups([])
            return loss
        _refuse_capture("step()")
        with _full_precision(self._attachment.layer.weight):
            self._step_groups(self._updates(self._attachment))
            self._attachment.remember_weight()
        for watch in (self._watch, self._edge):
            if watch is not None:
                watch.tell()
        return loss

    def _has_gradients(self) -> bool:
        gradients = (p.grad for group in self.param_groups for p in group["params"])
        return any(g is not None and bool(g.count_nonzero()) for g in gradients)

    def _has_no_gradient(self) -> bool:
        return all(p.grad is None for group in self.param_groups for p in group["params"])

    def _required(self, what: str) -> Attachment:
        if self._attachment is None:
            raise ValueError(
                f"DecoupledDescent: {what} needs an attached optimizer; construct it with the "
                "module, or call attach(module)"
            )
        return self._attachment

    def _require_no_shadow(self) -> None:
        if any("shadow" in state for state in self.state.values()):
            raise RuntimeError(
                "DecoupledDescent: this optimizer is not attached, but its state holds shadows. "
                "Call attach(module) to go on with them, or detach() to go on as plain SGD."
            )

    def _flush(self) -> None:
        if self._attachment is not None:
            with torch.no_grad():
                self._attachment.shadows.flush(self.state[self._attachment.layer.weight])

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        attachment = self._attachment
        if attachment is None or not layer.training:
            return None
        if layer is not attachment.layer:
            _refuse_replica(layer)
            return None
        _refuse_capture("a training forward")
        attachment.require_weight_in_place()
        state = self.state[attachment.layer.weight]
        if state.get("shadow") is None and "momentum_buffer" in state:
            raise RuntimeError(
                f"DecoupledDescent: layer {attachment.name!r} has momentum from steps without "
                "correction. Attach before the first step, or load the state of an attached "
                "optimizer."
            )
        leads_to_step = torch.is_grad_enabled()
        if leads_to_step and attachment.has_delivered and not self._has_gradients():
            # Cleared by other means than zero_grad(), as after a skipped step.
            attachment.drop_abandoned()
        with _full_precision(output):
            placement = attachment.place(inputs, state, binds=leads_to_step)
            attachment.now = placement
            attachment.rows_seen += len(inputs)
            corrected = attachment.preactivation(placement, output, state)
            signal = None
            if attachment.shared is not None:
                signal = self._signal(attachment, inputs, placement)
                index = None if placement is None else placement.index
                corrected = attachment.shared.correct_preactivation(
                    corrected, signal, self._read, index
                )
            if not leads_to_step:
                return corrected
            assert placement is not None
            for parameter, _ in attachment.shadowed:
                self._require_own(attachment, parameter)
            seed = _probe_seed(
                self._seed, state.get("shadow_step", 0), len(attachment.pending), attachment.ranks
            )
            has_shadow = state.get("shadow") is not None
            outgoing = attachment.capture(placement, inputs, corrected, seed, has_shadow=has_shadow)
            attachment.pending[-1].signal = signal
            if has_shadow:
                self._require_fitting_state(attachment, len(state["shadow"]))
            if self._watches(attachment, placement):
                self._watch_for(attachment, len(inputs)).observe(corrected)
            return outgoing

    def _signal(
        self, attachment: Attachment, inputs: Tensor, placement: Placement | None
    ) -> Tensor:
        shared, count = attachment.shared, attachment.samples.count
        assert shared is not None
        signal = shared.signal(inputs, placement)
        if (
            placement is not None
            and count is not None
            and self._read(attachment.weight, "shadow") is not None
        ):
            with torch.no_grad():
                shared.make(self._read, self._write, count, signal)
        return signal

    def _watches(self, attachment: Attachment, placement: Placement) -> bool:
        # The watches follow all samples from step to step.
        return placement.index is None and attachment.ranks.size == 1

    def _require_fitting_state(self, attachment: Attachment, bins: int) -> None:
        assert attachment.noise is not None
        expected = len(attachment.noise.eigenvalues)
        missing = any(self._read(*part) is None for part in attachment.shadowed)
        surplus = (
            attachment.shared is None
            and self._read(attachment.layer.weight, "signal_shadow") is not None
        )
        if bins == expected and not missing and not surplus:
            return
        attachment.drop()
        raise RuntimeError(
            f"DecoupledDescent: the state holds {bins} shadows a sample"
            + ("" if missing else " and those of a corrected head" if surplus else "")
            + f", but this optimizer's noise model has {expected} bins and head="
            f"{attachment.shared is not None}. Load a state into an optimizer of the same noise "
            "model and head= as the one it came from."
        )

    def _watch_for(self, attachment: Attachment, num_samples: int) -> DivergenceWatch:
        noise = attachment.noise
        assert noise is not None
        if self._watch is None:
            self._watch = DivergenceWatch(noise.eigenvalues, noise.multiplicities, num_samples)
        return self._watch

    def _correct_scores(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        attachment = self._attachment
        if attachment is None or attachment.shared is None or not attachment.layer.training:
            return None
        shared = attachment.shared
        if head is not shared.head or not head.training:
            return None
        # A marked tensor must not see the hook, nor an operation in place the tensor under it.
        with _full_precision(output), torch._C.DisableTorchFunctionSubclass():
            features = shared.features(inputs)
            index = None if attachment.now is None else attachment.now.index
            corrected = shared.correct_scores(output, features, self._read, index)
            # Without a pending forward the head runs by itself, and no step will come of it.
            if not torch.is_grad_enabled() or not attachment.pending:
                return corrected
            if attachment.pending[-1].scores is not None:
                raise RuntimeError(
                    f"DecoupledDescent: head {shared.name!r} must run once in every training "
                    f"forward, after layer {attachment.name!r}; run other forwards under "
                    "model.eval() or torch.no_grad()"
                )
            if corrected is output:
                corrected = output.clone()
            attachment.pending[-1].follow(output, corrected, features)
        return corrected if type(output) is Tensor else corrected.as_subclass(type(output))

    def _write(self, parameter: Tensor, key: str, value: Tensor) -> None:
        self.state[parameter][key] = value

    def _read(self, parameter: Tensor, key: str) -> Tensor | None:
        state: dict[str, Any] = self.state.get(parameter, {})
        return state.get(key)

    def _group_of(self, parameter: Tensor) -> dict[str, Any] | None:
        groups = self.param_groups
        return next((g for g in groups if any(p is parameter for p in g["params"])), None)

    def _require_own(self, attachment: Attachment, parameter: Tensor) -> None:
        if self._group_of(parameter) is not None:
            return
        name = next(n for n, p in attachment.module.named_parameters() if p is parameter)
        raise ValueError(
            f"DecoupledDescent: {name!r} is not among this optimizer's parameters; construct the "
            "optimizer with the parameters of this module, after what exchanges them (to_empty)"
        )

    def _updates(self, attachment: Attachment) -> list[ShadowUpdate]:
        weight = attachment.layer.weight
        if not attachment.pending:
            self._check_idle(attachment)
            return self._idle_updates(attachment)
        if any(c.gradient is None for c in attachment.pending) or weight.grad is None:
            raise RuntimeError(
                "DecoupledDescent: step() before loss.backward(): a training forward has no "
                f"gradient at layer {attachment.name!r}. Call loss.backward() on a loss of that "
                "forward, or optimizer.drop_forward() to give it up."
            )
        self._check_finite(attachment)
        pushes = attachment.pushes()
        edit = attachment.edit_scale(pushes)
        if attachment.shared is not None and pushes.scores is not None:
            attachment.shared.check_gradients(
                pushes.gradient, pushes.scores, edit, attachment.ranks
            )
        # A data-parallel loss is the mean of the ranks' losses.
        scale = edit / attachment.ranks.size
        curvature = attachment.curvature(pushes, scale, self.state[weight])
        shared = self._shared_curvature(attachment, pushes, scale)
        pushes = attachment.pushes_of_all_ranks(pushes)
        updates = self._shared_updates(attachment, pushes, scale, shared)
        updates.insert(0, self._layer_update(attachment, pushes, scale, curvature))
        attachment.drop()
        attachment.samples.finish()
        return updates

    def _shared_curvature(
        self, attachment: Attachment, pushes: Pushes, scale: float
    ) -> Tensor | None:
        shared = attachment.shared
        if shared is None:
            return None
        if pushes.scores is None or pushes.scores.gradient is None:
            raise RuntimeError(
                f"DecoupledDescent: head {shared.name!r} took no part in the last training forward "
                "and backward; name the layer that computes the scores with head="
            )
        curvature = shared.curvature(pushes, scale, attachment.ranks)
        if self._watches(attachment, pushes.placement):
            if self._edge is None:
                self._edge = SharpnessWatch()
            self._edge.look(curvature, self.param_groups)
        return curvature

    def _shared_updates(
        self, attachment: Attachment, pushes: Pushes, scale: float, curvature: Tensor | None
    ) -> list[ShadowUpdate]:
        shared, count = attachment.shared, attachment.samples.count
        if shared is None or curvature is None:
            return []
        assert pushes.signal is not None
        assert count is not None
        shared.make(self._read, self._write, count, pushes.signal)
        found = shared.shadow_gradients(pushes, curvature, scale, self._read)
        return [
            ShadowUpdate(
                parameter,
                shadow,
                gradient,
                self._read(parameter, f"{key}_momentum_buffer"),
                keeping(self.state[parameter], f"{key}_momentum_buffer"),
            )
            for parameter, key, shadow, gradient in found
        ]

    def _layer_update(
        self, attachment: Attachment, pushes: Pushes, scale: float, curvature: Tensor
    ) -> ShadowUpdate:
        weight, noise = attachment.layer.weight, attachment.noise
        count = attachment.samples.count
        assert noise is not None
        assert count is not None
        assert weight.grad is not None
        state = self.state[weight]
        gradient = pushes.by_sample
        if scale != 1.0:
            gradient = scale * gradient
        if not bool(curvature.isfinite().all()):
            raise RuntimeError(
                f"DecoupledDescent: {len(gradient)} samples do not resolve the curvature of the "
                f"{gradient.shape[1]} units of layer {attachment.name!r}; use fewer units or more "
                'samples, or give component ids for curvature="stein"'
            )
        group = self._group_of(weight)
        assert group is not None
        if self._watches(attachment, pushes.placement):
            self._watch_for(attachment, len(gradient)).look(gradient, curvature, group)
        attachment.shadows.make(state, noise, count, gradient)
        assert attachment.samples.known is not None
        state["shadow_samples"] = attachment.samples.known.values
        if attachment.given_noise is None:
            state["shadow_noise"] = torch.stack(
                [noise.eigenvalues, noise.multiplicities.to(noise.eigenvalues)]
            )
        state["shadow_step"] = state.get("shadow_step", 0) + 1
        damped = None
        if self._damping != 1.0:
            damped = damped_weight_gradient(
                weight.grad, weight, curvature, noise.eigenvalues, self._damping
            )
        return attachment.shadows.update(
            state,
            pushes.placement,
            gradient,
            curvature,
            noise,
            self._damping,
            weight,
            momentum=group["momentum"] != 0,
            parameter_gradient=damped,
        )

    def _step_groups(self, updates: list[ShadowUpdate]) -> None:
        for group in self.param_groups:
            self._step_group(group, updates)

    def _step_group(self, group: dict[str, Any], updates: list[ShadowUpdate]) -> None:
        # One call updates weights and shadows, so that whatever rule moves W moves Q.
        params: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor | None] = []
        sparse = self._init_group(group, params, gradients, buffers)
        count = len(params)
        position = {id(parameter): i for i, parameter in enumerate(params)}
        moving = [update for update in updates if id(update.parameter) in position]
        for update in moving:
            if update.parameter_gradient is not None:
                gradients[position[id(update.parameter)]] = update.parameter_gradient
            params.append(update.tensor)
            gradients.append(update.gradient)
            if group["momentum"] != 0:
                buffers.append(update.buffer)
        self._apply_rule(group, params, gradients, buffers, sparse=sparse)
        has_buffers = group["momentum"] != 0
        if has_buffers:
            for parameter, buffer in zip(params[:count], buffers[:count], strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
        for number, update in enumerate(moving, count):
            update.finish(buffers[number] if has_buffers else None)

    def _apply_rule(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor | None],
        *,
        sparse: bool,
    ) -> None:
        decay = group["weight_decay"]
        if group["decoupled_weight_decay"]:
            shrunk = 1 - group["lr"] * decay
            found_inf = getattr(self, "found_inf", None)
            if found_inf is not None:
                shrunk = 1 - group["lr"] * decay * (1 - found_inf)
            for parameter in params:
                parameter.mul_(shrunk)
            decay = 0.0
        sgd(
            params,
            gradients,
            buffers,
            weight_decay=decay,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=sparse,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    def _idle_updates(self, attachment: Attachment) -> list[ShadowUpdate]:
        # Momentum and weight decay move W on a zero gradient too, and then they move Q.
        self._flush()
        found = [(p, key, self._read(p, key)) for p, key in attachment.shadowed]
        return [
            ShadowUpdate(
                parameter,
                shadow,
                torch.zeros_like(shadow),
                self._read(parameter, f"{key}_momentum_buffer"),
                keeping(self.state[parameter], f"{key}_momentum_buffer"),
            )
            for parameter, key, shadow in found
            if shadow is not None
        ]

    def _check_idle(self, attachment: Attachment) -> None:
        # Distributed checkpointing creates optimizer state by a step on zero gradients.
        if self._has_gradients():
            raise RuntimeError(
                "DecoupledDescent: step() without a training forward. The gradients come from "
                f"somewhere else than layer {attachment.name!r} in train mode: call model.train() "
                "before the forward, name the layer that the forward uses with layer=, call "
                "torch._dynamo.reset() if the model was compiled and run before it was attached, "
                "or call optimizer.detach() to go on as plain SGD."
            )

    def _check_finite(self, attachment: Attachment) -> None:
        captured = [c.gradient for c in attachment.pending if c.gradient is not None]
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [*captured, *(p.grad for p in moved if p.grad is not None)]
        finite = torch.stack([_values(g.detach()).isfinite().all() for g in gradients])
        if bool(finite.all()):
            return
        attachment.drop()
        known = {id(p): name for name, p in attachment.module.named_parameters()}
        names = [f"the output of {attachment.name!r}"] * len(captured)
        names += [known.get(id(p), f"parameter {i}") for i, p in enumerate(moved)]
        bad = [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]
        step = self.state[attachment.layer.weight].get("shadow_step", 0)
        raise FloatingPointError(
            f"DecoupledDescent: the gradient of {', '.join(dict.fromkeys(bad))} is not finite at "
            f"step {step}; nothing was updated. Likely causes: the learning rate is too large "
            "(halve it), or the inputs or targets contain NaN or infinity."
        )


def _check_rate(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    # A rate on a device is not read back: that would stall every step.
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return
    value = float(lr.detach()) if isinstance(lr, Tensor) else lr
    # A schedule that ends at 0 can round to just below it.
    if not (math.isfinite(value) and value >= -_RATE_ROUNDING):
        raise ValueError(
            f"Invalid learning rate: {value}; DecoupledDescent expects a finite rate of at least "
            "0. Check the learning-rate schedule if it came from one."
        )


def _full_precision(tensor: Tensor) -> torch.autocast:
    # Under the caller's autocast the correction would be rounded to half precision.
    return torch.autocast(tensor.device.type, enabled=False)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _probe_seed(seed: int, step: int, forward: int, ranks: Ranks) -> int:
    # The first forward of a step on a single process draws what it always drew.
    apart = 0xBF58476D1CE4E5B9 * (forward + 2**16 * ranks.rank)
    return (seed * 0x9E3779B97F4A7C15 + step + apart) % 2**63


def _is_own(key: str) -> bool:
    return "shadow" in key


def _refuse_capture(what: str) -> None:
    # Asking a device that was never used would start it.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"DecoupledDescent: {what} while a CUDA graph is captured. A graph replays the same "
            "kernels, but the correction looks at every batch and every gradient on the CPU. Run "
            "training forwards and step() outside of torch.cuda.graph; capture nothing, or what "
            "lies between the decoupled layer and the loss"
        )


def _refuse_replica(layer: nn.Module) -> None:
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "DecoupledDescent: torch.nn.DataParallel replicates the decoupled layer at every "
            "forward, out of the optimizer's sight; use DistributedDataParallel or one device"
        )
