"""Decoupled descent as a drop-in replacement for :class:`torch.optim.SGD`."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from dd.attachment import Attachment
from dd.best_state import BestState
from dd.curvature import check_name
from dd.estimate import Estimate
from dd.evaluation import corrected_estimate, corrected_mean
from dd.head_choice import AUTO
from dd.line_family import Trial
from dd.line_search import LineSearch, Policy
from dd.line_settings import (
    is_auto,
    require_closure,
    require_plain_rule,
    stops_itself,
    without_rates,
)
from dd.line_step import MEMORY, LineStep
from dd.loaders import tracked
from dd.noise import NoiseModel
from dd.plain_numbers import as_plain
from dd.shadow_step import ShadowStep
from dd.shadows import ShadowUpdate
from dd.store import HEAD_LEFT, Store
from dd.training_forward import TrainingForward, full_precision, refuse_capture
from dd.watches import Watches

__all__ = ["DecoupledDescent"]

_RATE_ROUNDING = 1e-12
_SETTINGS = ("_curvature", "_damping", "_head", "_policy", "_seed", "_stops")


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
        lr: learning rate, finite and not negative; or ``"auto"``: every step goes where the
            training loss, an estimate of the test loss, is low. Then call ``step(closure)`` with a
            closure over all training samples, as for ``torch.optim.LBFGS``; the loss of any such
            step is known without a pass over the inputs. The groups' ``"lr"`` reports the step
            that was taken; a schedule that changes it has no effect.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: coupled L2 penalty.
        nesterov: use Nesterov momentum.
        layer: the decoupled layer or its dotted name; by default the first ``nn.Linear`` with
            trainable weights.
        noise: covariance of the inputs within mixture components, and the components where they
            are known; by default fitted on the first training batch, without components, and
            isotropic where that batch is too large for its spectrum (min(n, d) beyond 20 000).
        curvature: estimator of the loss's curvature in the pre-activations: ``"auto"``, which is
            ``"probe"``; ``"stein"``, for inputs that are Gaussian within the components of
            ``noise``; ``"probe_create_graph"`` or ``"exact"``, which need
            ``loss.backward(create_graph=True)``.
        damping: ρ in [0, 1]; 1 updates W as gradient descent does, less removes a share of the
            drift (isotropic noise only).
        head: whether the network's last linear layer (True), or the one given or named, is
            corrected for its own over-fitting too, and with it the decoupled layer's bias and its
            weights along the component means; for softmax cross-entropy. Takes n p numbers and
            n p² operations a step, p the number of these weights. ``"auto"``: where ``noise`` was
            fitted with the components, p is more than a twentieth of the samples and n p² at most
            5·10⁸ (2·10⁹ with ``lr="auto"``), as long as loss and loop allow it, on one process.
            Where ``lr`` is a number and inputs are few for the samples (n ≥ 20 d and 2 k times the
            noise's effective rank), both follow all of the decoupled layer so, and nothing is
            assumed of the noise, unless ``curvature`` is given.
        seed: of the curvature probes; the global generators are left alone.
        decoupled_weight_decay: shrink the parameters by lr · weight_decay themselves, outside of
            momentum (Loshchilov and Hutter 2019), instead of adding the decay to the gradient.
        stop: ``"auto"``, with ``lr="auto"``: once the training loss, an estimate of the test loss,
            has not improved by two of its own standard errors in five steps, the weights of
            the lowest one are put back, and further steps leave them alone. Keeps a copy of
            weights and shadows.
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
        lr: float | Tensor | str = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        layer: nn.Module | str | None = None,
        noise: NoiseModel | None = None,
        curvature: str = "auto",
        damping: float = 1.0,
        head: bool | nn.Module | str = AUTO,
        seed: int = 0,
        decoupled_weight_decay: bool = False,
        stop: str | None = None,
        process_group: Any = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        # Not on the class: a wrapper that inherits from it would see those instead of its own.
        self._attachment: Attachment | None = None
        self._watches = Watches()
        self._policy: Policy | None = LineSearch() if is_auto(lr) else None
        self._stops = stops_itself(stop, searching=self._policy is not None)
        if isinstance(lr, str):
            lr = 0.0
        _check_rate(lr)
        if not 0.0 <= damping <= 1.0:
            raise ValueError(f"DecoupledDescent: damping must lie in [0, 1], got {damping}")
        check_name(curvature)
        if process_group is True:
            raise ValueError(
                "DecoupledDescent: process_group must be a torch.distributed process group, None "
                "for the default one, or False to train alone"
            )
        module = params if isinstance(params, nn.Module) else None
        if module is None and (layer is not None or noise is not None):
            raise ValueError(
                "DecoupledDescent: layer= and noise= need a module; pass the module in place of "
                "its parameters, or give them to attach(module, layer=..., noise=...)"
            )
        if self._policy is not None:
            require_plain_rule(
                {
                    "momentum": momentum,
                    "dampening": dampening,
                    "weight_decay": weight_decay,
                    "nesterov": nesterov,
                    "decoupled_weight_decay": decoupled_weight_decay,
                    "maximize": maximize,
                    "differentiable": differentiable,
                    "damping": damping,
                }
            )
            params = without_rates(params)
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
        self._settle()
        return self.state[layer.weight].get("shadow")

    @property
    def stopped(self) -> bool:
        """Whether ``stop="auto"`` has ended training; steps change nothing any more."""
        state = {} if self.layer is None else self.state[self.layer.weight]
        return bool(state.get(MEMORY, {}).get("stopped"))

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
        head = self._head
        if head == AUTO and not self._owns_all(module):
            head = False
        attachment = Attachment(
            module,
            layer,
            noise,
            self._curvature,
            head,
            bins,
            self._process_group,
            searches=self._policy is not None,
        )
        for parameter, _ in attachment.shadowed:
            self._store().require_own(attachment, parameter)
        if noise is not None and len(noise.eigenvalues) > 1 and self._damping != 1.0:
            raise ValueError(
                f"DecoupledDescent: damping={self._damping} is defined for isotropic noise, got a "
                f"noise model of {len(noise.eigenvalues)} bins; use damping=1 or "
                "NoiseModel.isotropic"
            )
        if attachment.shared is not None and self._damping != 1.0:
            raise ValueError("DecoupledDescent: head=True needs damping=1")
        if any(group["differentiable"] for group in self.param_groups):
            raise ValueError("DecoupledDescent: differentiable=True works only while unattached")
        attachment.register(self)
        self._attachment = attachment
        self._follow_head_as_state(attachment)
        attachment.bind(self.state.get(attachment.weight, {}))
        # A gradient scaler must not leave the skipping of a step to the fused update.
        self._step_supports_amp_scaling = False

    def _owns_all(self, module: nn.Module) -> bool:
        """Whether all trained parameters of a module are this optimizer's."""
        trained = (p for p in module.parameters() if p.requires_grad)
        return all(self._store().group_of(p) is not None for p in trained)

    def detach(self) -> None:
        """Remove every trace from the module; from here on this is ``torch.optim.SGD``."""
        attachment = self._attachment
        if attachment is not None:
            attachment.remove()
        for state in self.state.values():
            for key in [k for k in state if _is_own(k)]:
                del state[key]
        self._attachment, self._watches = None, Watches()
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)
        if attachment is not None:
            attachment.verdicts.settle(wait=True)

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
        try:
            index = torch.as_tensor(indices)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"DecoupledDescent: batch() takes the integer indices of samples; {error}"
            ) from error
        samples.withdraw()
        samples.announce(index)

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
        self._settle()
        return corrected_mean(self._required("evaluate()"), batches, loss)

    @_disable_dynamo
    @torch.no_grad()
    def estimate(
        self,
        batches: Iterable[Any],
        losses: Callable[[Any], Tensor],
        confidence: float = 0.9,
    ) -> Estimate:
        """Estimate of the test loss from training samples, with a confidence interval.

        As :meth:`evaluate`, but from the loss of every sample.

        Args:
            batches: training samples, such as the loader used in training; each sample once.
            losses: takes a batch, runs the model on it once, and returns the loss of each of its
                samples, shape (m,), or several figures of each, such as loss and error, shape
                (m, j).
            confidence: probability that the interval is meant to hold the test loss with.

        Raises:
            ValueError: if unattached, there are not at least two samples, ``losses`` does not
                return a row a sample, or the confidence is out of range.
            RuntimeError: if a batch did not pass through the decoupled layer.
        """
        self._settle()
        return corrected_estimate(self._required("estimate()"), batches, losses, confidence)

    @_disable_dynamo
    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the lowest training loss that ``stop="auto"`` has seen.

        For training that ends before it stops by itself.

        Raises:
            RuntimeError: if there are none: ``stop`` is not ``"auto"``, or no step was made from
                weights that know of the signal.
        """
        attachment = self._required("restore_best()")
        best = BestState(self._store(), attachment.module, attachment.weight)
        if not best.restore():
            raise RuntimeError(
                "DecoupledDescent: restore_best() found no best weights; they are kept by "
                'lr="auto", stop="auto", once the weights know of the signal'
            )
        attachment.remember_weight(self.state[attachment.weight])
        self.drop_forward()

    @_disable_dynamo
    def drop_forward(self) -> None:
        """Forget training forwards that will get no step, after a skipped or interrupted one."""
        if self._attachment is not None:
            self._attachment.drop()
            self._attachment.samples.release()
            self._attachment.verdicts.withdraw()
            if self._store().read(self._attachment.weight, "shadow") is None:
                self._attachment.forget()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forwards whose backward has run but whose step was skipped.

        Args:
            set_to_none: as in ``torch.optim.SGD``.
        """
        if self._attachment is not None:
            self._attachment.drop_abandoned()
            if not self._attachment.pending:
                self._attachment.verdicts.withdraw()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; numbers of numpy become Python's.

        Args:
            param_group: as in ``torch.optim.SGD``.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update({key: as_plain(value) for key, value in group.items() if key != "params"})

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the shadows of all samples up to date.

        Numbers of numpy in the groups become Python's, which ``torch.load(weights_only=True)``
        reads.
        """
        self._settle()
        state = super().state_dict()
        state["param_groups"] = [as_plain(group) for group in state["param_groups"]]
        return state

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, shadows included, and forget pending training forwards.

        Args:
            state_dict: of an optimizer attached to the same layer and samples, or unattached.

        Raises:
            ValueError: if the noise model knows the samples one by one, and the state is of others
                or of another order; the next forward raises it too.
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
            self._watches = Watches()
            self._follow_head_as_state(self._attachment)
            self._attachment.bind(self.state.get(self._attachment.weight, {}))

    def _follow_head_as_state(self, attachment: Attachment) -> None:
        """Follow the head, and as much of the decoupled layer, as the state does."""
        shared = attachment.shared
        state = self._store().state.get(attachment.weight, {})
        if shared is None or state.get("shadow") is None:
            return
        found = state.get("signal_shadow")
        if found is not None:
            attachment.follow_directions(found.shape[2])
        elif attachment.head_is_optional:
            reason = "the state is of a run that gave it up."
            attachment.leave_head(reason, begun=HEAD_LEFT in state)

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
        self._settle()
        bond = None
        if self._attachment is not None:
            attachment = self._attachment
            left = attachment.has_left_head
            noise = attachment.given_noise if left else attachment.noise_of_all
            said = attachment.oversight.state_dict()
            bond = (attachment.module, attachment.name, noise, said)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if self._attachment is not None and self._attachment.has_left_head:
            settings["_head"] = False
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
            self._attachment, self._watches = None, Watches()
            self._policy, self._stops = None, False
            vars(self).update(settings)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", False)
        if bond is not None:
            module, layer, noise, *said = bond
            self.attach(module, layer=layer, noise=noise)
            if said and self._attachment is not None:
                self._attachment.oversight.load_state_dict(said[0])

    # A compiled step would keep some of the first one's shadows for good.
    @_disable_dynamo
    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update parameters and shadows.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss;
                required, and called several times, with ``lr="auto"``.

        Returns:
            What ``closure`` returned, at its first call, or None.

        Raises:
            ValueError: if a learning rate is negative or not finite, or ``lr="auto"`` lacks a
                closure or has settings that it does not go with.
            TypeError: if a closure does not return the loss that ``lr="auto"`` needs.
            RuntimeError: if attached and no training forward and backward came before, the weight
                gradient is not the one they delivered, the curvature could not be had, or a CUDA
                graph is captured.
            FloatingPointError: if attached and a gradient is not finite; nothing is changed.

        On CUDA a plain step does not wait for the device (:meth:`dd.store.Store.may_defer`): what
        is wrong with it is raised by a later forward, step, :meth:`state_dict`, :meth:`evaluate` or
        :meth:`detach`, and it changed no weight, shadow or momentum.

        Warns:
            DivergenceWarning: once, if the correction has begun to feed back on itself.
        """
        if self._policy is not None:
            return self._step_searched(closure, self._policy)
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
        refuse_capture("step()")
        self._step_attached(self._attachment)
        self._watches.tell(self._attachment.oversight)
        return loss

    def _step_attached(self, attachment: Attachment) -> None:
        verdicts, store = attachment.verdicts, self._store()
        if verdicts.defers and (self._watches.looks or not store.may_defer(attachment)):
            verdicts.end()
        verdicts.settle(wait=not verdicts.defers)
        try:
            step = ShadowStep(attachment, store, self._watches, self._damping)
            with full_precision(attachment.weight):
                updates = step.updates()
                self._step_groups(updates, verdicts.refusal)
                attachment.remember_weight(self.state[attachment.weight])
        finally:
            verdicts.end()

    def _step_searched(self, closure: Callable[[], Any] | None, policy: Policy) -> Any:
        require_closure(closure)
        attachment = self._required('step() with lr="auto"')
        refuse_capture("step()")
        assert closure is not None
        try:
            if self.stopped:
                with torch.enable_grad():
                    loss = closure()
                self.drop_forward()
                return loss
            return LineStep(attachment, self._store(), policy, stops=self._stops)(closure)
        except BaseException:
            self.drop_forward()
            raise

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

    def _settle(self) -> None:
        """Bring the shadows of all samples up to date, and raise what is still to be told."""
        if self._attachment is not None:
            self._attachment.verdicts.settle(wait=True)
            with torch.no_grad():
                self._attachment.shadows.flush(self.state[self._attachment.layer.weight])

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        forward = self._forward()
        return None if forward is None else forward.at_layer(layer, inputs, output)

    def _correct_scores(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        forward = self._forward()
        return None if forward is None else forward.at_head(head, inputs, output)

    def _forward(self) -> TrainingForward | Trial | None:
        if self._attachment is None:
            return None
        if self._attachment.trial is not None:
            return self._attachment.trial
        searched = self._policy is not None
        return TrainingForward(
            self._attachment, self._store(), self._watches, self._seed, defers=not searched
        )

    def _store(self) -> Store:
        return Store(self.state, self.param_groups)

    def _step_groups(self, updates: list[ShadowUpdate], refusal: Tensor | None = None) -> None:
        for group in self.param_groups:
            self._step_group(group, updates, refusal)

    def _step_group(
        self, group: dict[str, Any], updates: list[ShadowUpdate], refusal: Tensor | None
    ) -> None:
        params: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor | None] = []
        sparse = self._init_group(group, params, gradients, buffers)
        position = {id(parameter): i for i, parameter in enumerate(params)}
        moving = [update for update in updates if id(update.parameter) in position]
        for update in moving:
            if update.parameter_gradient is not None:
                gradients[position[id(update.parameter)]] = update.parameter_gradient
        rule = partial(self._apply_rule, group, refusal=refusal)
        rule(params, gradients, buffers, sparse=sparse)
        momentum = group["momentum"] != 0
        if momentum:
            for parameter, buffer in zip(params, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
        # By the very call that moved the weights, so that whatever rule moves W moves Q.
        dense = bool(group["fused"]) or refusal is not None
        for update in moving:
            for piece in update.pieces():
                piece.move(rule, momentum=momentum, dense=dense)

    def _apply_rule(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor | None],
        *,
        sparse: bool = False,
        refusal: Tensor | None = None,
    ) -> None:
        # Torch's fused update changes nothing where it is told that something was infinite.
        found_inf = getattr(self, "found_inf", None) if refusal is None else refusal
        decay = group["weight_decay"]
        if group["decoupled_weight_decay"]:
            for parameter in params:
                kept = 1 if found_inf is None else 1 - found_inf.to(parameter.dtype)
                parameter.mul_(1 - group["lr"] * decay * kept)
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
            foreach=group["foreach"] if refusal is None else False,
            fused=group["fused"] if refusal is None else True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
        )


def _check_rate(lr: float | Tensor | str) -> None:
    if isinstance(lr, str):
        raise ValueError(
            f'Invalid learning rate: {lr!r} in a parameter group; DecoupledDescent takes lr="auto" '
            "for all parameters alone, as its own argument"
        )
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


def _is_own(key: str) -> bool:
    return "shadow" in key
