"""Decoupled descent as a drop-in replacement for :class:`torch.optim.SGD`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from dd.attachment import Attachment, Capture
from dd.curvature import check_name
from dd.divergence import DivergenceWatch, SharpnessWatch
from dd.functional import at_least_single, damped_weight_gradient, shadow_gradient
from dd.noise import NoiseModel

__all__ = ["DecoupledDescent"]


@dataclass(frozen=True)
class _ShadowUpdate:
    """A shadow with its gradient, to be stepped with its parameter.

    The parameter itself descends ``parameter_gradient`` where that is not its own gradient.
    """

    parameter: Tensor
    key: str
    shadow: Tensor
    gradient: Tensor
    parameter_gradient: Tensor | None = None

    @property
    def buffer_key(self) -> str:
        return f"{self.key}_momentum_buffer"


class DecoupledDescent(torch.optim.SGD):
    """Gradient descent whose training loss is, at every step, an estimate of the test loss.

    Lovig, arXiv 2604.27883. Given a module, it attaches itself to the first linear layer: in train
    mode the layer's output is the corrected pre-activation R = XW + Q, where the shadow Q removes
    from each sample the imprint that it left on the weights. In eval mode the network is the plain
    one. Given parameters, it is ``torch.optim.SGD`` until :meth:`attach` is called.

    While attached, every training forward must hold the whole training set in one order.

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
        maximize: ascend instead of descend.
        foreach: as in ``torch.optim.SGD``.
        differentiable: as in ``torch.optim.SGD``; only while unattached.
        fused: as in ``torch.optim.SGD``.

    Raises:
        ValueError: if an argument is out of range, or the module has no layer to decouple.
        TypeError: if ``layer`` is not an ``nn.Linear``.
    """

    _attachment: Attachment | None = None
    _watch: DivergenceWatch | None = None
    _edge: SharpnessWatch | None = None
    _curvature: str = "auto"
    _damping: float = 1.0
    _head: bool | nn.Module | str = False
    _seed: int = 0

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
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
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
        return None if layer is None else self.state[layer.weight].get("shadow")

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
        samples: attach before the first step on them.

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
        attachment = Attachment(module, layer, noise, self._curvature, self._head, bins)
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

    def detach(self) -> None:
        """Remove every trace from the module; from here on this is ``torch.optim.SGD``."""
        if self._attachment is None:
            return
        self._attachment.remove()
        for parameter, key in self._attachment.shadowed:
            for name in (key, f"{key}_momentum_buffer", "shadow_step", "shadow_samples"):
                self.state[parameter].pop(name, None)
        self._attachment = self._watch = self._edge = None

    def drop_forward(self) -> None:
        """Forget a training forward that will get no step, after a skipped or interrupted one."""
        if self._attachment is not None:
            self._attachment.drop()
            if self.shadow is None:
                self._attachment.order.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and a forward whose backward has run but whose step was skipped.

        Args:
            set_to_none: as in ``torch.optim.SGD``.
        """
        pending = None if self._attachment is None else self._attachment.pending
        if pending is not None and pending.gradient is not None:
            self.drop_forward()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, shadows included, and forget a pending training forward.

        Args:
            state_dict: of an optimizer attached to the same layer and samples, or unattached.
        """
        super().load_state_dict(state_dict)
        if self._attachment is not None:
            self._attachment.forget()
            self._watch = self._edge = None

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
                gradient is not the one they delivered, or the curvature could not be had.
            FloatingPointError: if attached and a gradient is not finite; nothing is changed.

        Warns:
            DivergenceWarning: once, if the correction has begun to feed back on itself.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_rate(group["lr"])
        if self._attachment is None:
            self._step_groups([])
            return loss
        with _full_precision(self._attachment.layer.weight):
            self._step_groups(self._shadow_update(self._attachment))
            self._attachment.remember_weight()
        for watch in (self._watch, self._edge):
            if watch is not None:
                watch.tell()
        return loss

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        attachment = self._attachment
        if attachment is None or layer is not attachment.layer or not layer.training:
            return None
        state = self.state[attachment.layer.weight]
        shadow = state.get("shadow")
        if shadow is None and "momentum_buffer" in state:
            raise RuntimeError(
                f"DecoupledDescent: layer {attachment.name!r} has momentum from steps without "
                "correction. Attach before the first step, or load the state of an attached "
                "optimizer."
            )
        attachment.order.resume(state.get("shadow_samples"))
        with _full_precision(output):
            corrected = attachment.preactivation(inputs, output, shadow)
            signal = None
            if attachment.shared is not None:
                signal = attachment.shared.signal(inputs, checked=shadow is not None)
                corrected = attachment.shared.correct_preactivation(corrected, signal, self._read)
            if not torch.is_grad_enabled():
                return corrected
            seed = _probe_seed(self._seed, state.get("shadow_step", 0))
            outgoing = attachment.capture(inputs, corrected, seed, first=shadow is None)
            assert attachment.pending is not None
            attachment.pending.signal = signal
            if shadow is not None:
                self._require_fitting_state(attachment, len(shadow))
            self._watch_for(attachment, len(inputs)).observe(corrected)
            return outgoing

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
            corrected = shared.correct_scores(output, features, self._read)
            # Without a pending forward the head runs by itself, and no step will come of it.
            if not torch.is_grad_enabled() or attachment.pending is None:
                return corrected
            if attachment.pending.scores is not None:
                raise RuntimeError(
                    f"DecoupledDescent: head {shared.name!r} must run once in every training "
                    f"forward, after layer {attachment.name!r}; run other forwards under "
                    "model.eval() or torch.no_grad()"
                )
            if corrected is output:
                corrected = output.clone()
            attachment.pending.follow(output, corrected, features)
        return corrected if type(output) is Tensor else corrected.as_subclass(type(output))

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
            "optimizer with the parameters of this module"
        )

    def _shadow_update(self, attachment: Attachment) -> list[_ShadowUpdate]:
        capture = attachment.pending
        weight = attachment.layer.weight
        if capture is None:
            self._check_idle(attachment)
            return self._idle_updates(attachment)
        if capture.gradient is None or weight.grad is None:
            raise RuntimeError(
                "DecoupledDescent: step() before loss.backward(): the last training forward has no "
                f"gradient at layer {attachment.name!r}. Call loss.backward() on a loss of that "
                "forward, or optimizer.drop_forward() to give it up."
            )
        self._check_finite(attachment, capture)
        attachment.check_gradient(capture)
        attachment.check_head_gradient(capture)
        shared = self._shared_updates(attachment, capture)
        return [self._layer_update(attachment, capture), *shared]

    def _shared_updates(self, attachment: Attachment, capture: Capture) -> list[_ShadowUpdate]:
        if attachment.shared is None:
            return []
        assert capture.gradient is not None
        assert capture.signal is not None
        if capture.scores is None or capture.scores.gradient is None:
            raise RuntimeError(
                f"DecoupledDescent: head {attachment.shared.name!r} took no part in the last "
                "training forward and backward; name the layer that computes the scores with head="
            )
        gradient = at_least_single(capture.gradient.detach())
        found, curvature = attachment.shared.shadow_gradients(
            gradient, capture.scores, capture.signal, self._read
        )
        if self._edge is None:
            self._edge = SharpnessWatch()
        self._edge.look(curvature, self.param_groups)
        for parameter, key, shadow, _ in found:
            self.state[parameter][key] = shadow
        return [_ShadowUpdate(*part) for part in found]

    def _layer_update(self, attachment: Attachment, capture: Capture) -> _ShadowUpdate:
        layer, noise = attachment.layer, attachment.noise
        assert capture.gradient is not None
        assert noise is not None
        assert layer.weight.grad is not None
        gradient, curvature = capture.gradient.detach(), capture.curvature()
        if not bool(curvature.isfinite().all()):
            raise RuntimeError(
                f"DecoupledDescent: {len(gradient)} samples do not resolve the curvature of the "
                f"{gradient.shape[1]} units of layer {attachment.name!r}; use fewer units or more "
                'samples, or give component ids for curvature="stein"'
            )
        group = self._group_of(layer.weight)
        assert group is not None
        self._watch_for(attachment, len(gradient)).look(gradient, curvature, group)
        attachment.drop()
        state = self.state[layer.weight]
        shadow = state.get("shadow")
        if shadow is None:
            dtype = noise.eigenvalues.dtype
            shadow = gradient.new_zeros((len(noise.eigenvalues), *gradient.shape), dtype=dtype)
            state["shadow"] = shadow
            state["shadow_samples"] = attachment.order.projection
        state["shadow_step"] = state.get("shadow_step", 0) + 1
        damped = None
        if self._damping != 1.0:
            damped = damped_weight_gradient(
                layer.weight.grad, layer.weight, curvature, noise.eigenvalues, self._damping
            )
        moved = shadow_gradient(
            shadow,
            gradient,
            curvature,
            noise.eigenvalues,
            noise.mass,
            self._damping,
            noise.relative_mass,
        )
        return _ShadowUpdate(layer.weight, "shadow", shadow, moved, damped)

    def _step_groups(self, updates: list[_ShadowUpdate]) -> None:
        for group in self.param_groups:
            self._step_group(group, updates)

    def _step_group(self, group: dict[str, Any], updates: list[_ShadowUpdate]) -> None:
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
            params.append(update.shadow)
            gradients.append(update.gradient)
            if group["momentum"] != 0:
                buffers.append(self.state[update.parameter].get(update.buffer_key))
        sgd(
            params,
            gradients,
            buffers,
            weight_decay=group["weight_decay"],
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
        if group["momentum"] == 0:
            return
        for parameter, buffer in zip(params[:count], buffers[:count], strict=True):
            self.state[parameter]["momentum_buffer"] = buffer
        for update, buffer in zip(moving, buffers[count:], strict=True):
            self.state[update.parameter][update.buffer_key] = buffer

    def _idle_updates(self, attachment: Attachment) -> list[_ShadowUpdate]:
        # Momentum and weight decay move W on a zero gradient too, and then they move Q.
        return [
            _ShadowUpdate(parameter, key, shadow, torch.zeros_like(shadow))
            for parameter, key in attachment.shadowed
            if (shadow := self._read(parameter, key)) is not None
        ]

    def _check_idle(self, attachment: Attachment) -> None:
        # Distributed checkpointing creates optimizer state by a step on zero gradients.
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        if any(g is not None and bool(g.count_nonzero()) for g in gradients):
            raise RuntimeError(
                "DecoupledDescent: step() without a training forward. The gradients come from "
                f"somewhere else than layer {attachment.name!r} in train mode: call model.train() "
                "before the forward, name the layer that the forward uses with layer=, or call "
                "optimizer.detach() to go on as plain SGD."
            )

    def _check_finite(self, attachment: Attachment, capture: Capture) -> None:
        assert capture.gradient is not None
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [capture.gradient, *(p.grad for p in moved)]
        finite = torch.stack([_values(g.detach()).isfinite().all() for g in gradients])
        if bool(finite.all()):
            return
        attachment.drop()
        known = {id(p): name for name, p in attachment.module.named_parameters()}
        names = [f"the output of {attachment.name!r}"]
        names += [known.get(id(p), f"parameter {i}") for i, p in enumerate(moved)]
        bad = [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]
        step = self.state[attachment.layer.weight].get("shadow_step", 0)
        raise FloatingPointError(
            f"DecoupledDescent: the gradient of {', '.join(bad)} is not finite at step {step}; "
            "nothing was updated. Likely causes: the learning rate is too large (halve it), or the "
            "inputs or targets contain NaN or infinity."
        )


def _check_rate(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    # A rate on a device is not read back: that would stall every step.
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return
    if not (math.isfinite(lr) and lr >= 0.0):
        raise ValueError(
            f"Invalid learning rate: {lr}; DecoupledDescent expects a finite rate of at least 0. "
            "Check the learning-rate schedule if it came from one."
        )


def _full_precision(tensor: Tensor) -> torch.autocast:
    # Under the caller's autocast the correction would be rounded to half precision.
    return torch.autocast(tensor.device.type, enabled=False)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _probe_seed(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63
