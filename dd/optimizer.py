"""Decoupled descent as a drop-in replacement for :class:`torch.optim.SGD`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from dd.correction.attachment import Attachment
from dd.correction.head_choice import AUTO
from dd.correction.head_form import follow_state
from dd.correction.hook import Forward
from dd.correction.optimizer_state import OptimizerState
from dd.correction.saved_state import (
    bind_samples,
    forget_own,
    require_no_shadow,
    restore_values,
)
from dd.correction.shadows import ShadowUpdate
from dd.correction.tracker import Tracker
from dd.correction.training_forward import TrainingForward, refuse_capture
from dd.noise.model import NoiseModel
from dd.rules.after_search import restore_best, step_after_stop
from dd.rules.copied import Copied
from dd.rules.line_search.search import LineSearch, Policy
from dd.rules.line_search.settings import (
    is_auto,
    require_closure,
    require_plain_rule,
    stops_itself,
    without_rates,
)
from dd.rules.line_search.step import MEMORY, LineStep
from dd.rules.plain import has_told_plain
from dd.rules.settings import check_settings, refuse_without_module, require_isotropic
from dd.rules.sgd import GroupTensors, Scaling, attached_step, check_rate, move_group
from dd.support.plain_numbers import PlainGroups
from dd.watch.step_watches import StepWatches

__all__ = ["DecoupledDescent"]


class DecoupledDescent(Tracker, Copied, PlainGroups, torch.optim.SGD):
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
            trainable weights. Others that read the same inputs are joined to it; a list names
            all.
        noise: covariance of the inputs within mixture components, and the components where they
            are known; by default fitted on the first training batch, without components, and
            isotropic where that batch is too large for its spectrum (min(n, d) beyond 20 000).
        curvature: estimator of the loss's curvature in the pre-activations: ``"auto"``, which is
            ``"probe"``, but of samples of several rows with known components ``"stein"``, until an
            audit finds that it fails; ``"stein"``, for inputs that are Gaussian within the
            components of ``noise``; ``"probe_create_graph"`` or ``"exact"``, which need
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

    Example:
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     train_loss = criterion(model(X), y)
        ...     train_loss.backward()
        ...     optimizer.step()
        >>> test_loss = criterion(model.eval()(X_test), y_test)
        >>> bool((train_loss - test_loss).abs() < 0.05)
        True
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
        layer: nn.Module | str | Sequence[nn.Module | str] | None = None,
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
        self._watches, self._is_plain = StepWatches(), False
        self._policy: Policy | None = LineSearch() if is_auto(lr) else None
        self._stops = stops_itself(stop, searching=self._policy is not None)
        if isinstance(lr, str):
            lr = 0.0
        check_rate(lr)
        check_settings(damping, curvature, process_group)
        module = params if isinstance(params, nn.Module) else None
        if module is None:
            refuse_without_module(layer, noise)
        rule: dict[str, Any] = {
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        if self._policy is not None:
            shrinks = {"decoupled_weight_decay": decoupled_weight_decay, "damping": damping}
            require_plain_rule({**rule, **shrinks})
            params = without_rates(params)
        parameters = params.parameters() if isinstance(params, nn.Module) else params
        super().__init__(parameters, lr=lr, foreach=foreach, fused=fused, **rule)
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
    def stopped(self) -> bool:
        """Whether ``stop="auto"`` has ended training; steps change nothing any more."""
        state = {} if self.layer is None else self.state[self.layer.weight]
        return bool(state.get(MEMORY, {}).get("stopped"))

    def attach(
        self,
        module: nn.Module,
        *,
        layer: nn.Module | str | Sequence[nn.Module | str] | None = None,
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
            ValueError: if this optimizer is attached already, there is no layer to decouple, its
                weight is not among the optimizer's parameters, or the noise model does not fit it.
            TypeError: if ``layer`` is not an ``nn.Linear``.

        Example:
            >>> optimizer = dd.DecoupledDescent(model.parameters(), lr=0.5)  # SGD so far
            >>> optimizer.attach(model, noise=dd.NoiseModel.fit(X, y))
            >>> optimizer.layer is model[0]
            True
        """
        if self._attachment is not None:
            raise ValueError(
                f"DecoupledDescent: attached to layer {self._attachment.name!r} already; call "
                "detach() before attaching again"
            )
        head = self._head
        if head == AUTO and not self._store().owns_all(module):
            head = False
        attachment = Attachment(
            module,
            layer,
            noise,
            self._curvature,
            head,
            bins=None if self._damping == 1.0 else 1,
            process_group=self._process_group,
            searches=self._policy is not None,
        )
        for parameter, _ in attachment.shadowed:
            self._store().require_own(attachment, parameter)
        require_isotropic(self._damping, noise, attachment)
        if any(group["differentiable"] for group in self.param_groups):
            raise ValueError("DecoupledDescent: differentiable=True works only while unattached")
        attachment.register(self._correct, self._correct_scores)
        self._attachment = attachment
        follow_state(attachment, self._store().state)
        bind_samples(attachment, self.state.get(attachment.weight, {}))
        # A gradient scaler must not leave the skipping of a step to the fused update.
        self._step_supports_amp_scaling = False

    def detach(self) -> None:
        """Remove every trace from the module; from here on this is, in silence, plain SGD.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5)
            >>> optimizer.detach()
            >>> print(optimizer.layer)
            None
        """
        attachment = self._attachment
        if attachment is not None:
            attachment.remove()
        forget_own(self)
        self._attachment, self._watches, self._is_plain = None, StepWatches(), True
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)
        if attachment is not None:
            attachment.verdicts.settle(wait=True)

    @_disable_dynamo
    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the lowest training loss that ``stop="auto"`` has seen.

        For training that ends before it stops by itself.

        Raises:
            RuntimeError: if there are none: ``stop`` is not ``"auto"``, or no step was made from
                weights that know of the signal.

        Example:
            >>> noise = dd.NoiseModel.fit(X, y)
            >>> optimizer = dd.DecoupledDescent(model, lr="auto", stop="auto", noise=noise)
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = criterion(model(X), y)
            ...     loss.backward()
            ...     return loss
            >>> for step in range(4):
            ...     loss = optimizer.step(closure)
            >>> optimizer.restore_best()
        """
        restore_best(self._required("restore_best()"), self._store())
        self.drop_forward()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forwards whose backward has run but whose step was skipped.

        Args:
            set_to_none: as in ``torch.optim.SGD``.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> optimizer.zero_grad()
            >>> print(model[0].weight.grad)
            None
        """
        if self._attachment is not None:
            self._attachment.drop_cleared()
        super().zero_grad(set_to_none)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the shadows of all samples up to date.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> optimizer.step()
            >>> optimizer.state_dict()["state"][0]["shadow"].shape  # (bins, samples, width)
            torch.Size([1, 500, 4])
        """
        self._settle()
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, shadows included, and forget pending training forwards.

        Args:
            state_dict: of an optimizer attached to the same layer and samples, or unattached.

        Raises:
            ValueError: if the noise model knows the samples one by one, and the state is of others
                or of another order; the next forward raises it too.

        Example:
            >>> import io
            >>> noise = dd.NoiseModel.fit(X, y)
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise)
            >>> criterion(model(X), y).backward()
            >>> optimizer.step()
            >>> shadow, file = optimizer.shadow, io.BytesIO()
            >>> torch.save(optimizer.state_dict(), file)
            >>> optimizer.detach()
            >>> file.seek(0)
            0
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise)
            >>> optimizer.load_state_dict(torch.load(file, weights_only=True))
            >>> torch.equal(optimizer.shadow, shadow)
            True
        """
        given = [state_dict]
        # Last of the hooks that may exchange the state for another.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.append(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore_values(self, given[-1])
        if self._attachment is not None:
            self._attachment.forget()
            self._watches = StepWatches()
            follow_state(self._attachment, self._store().state)
            bind_samples(self._attachment, self.state.get(self._attachment.weight, {}))

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

        On CUDA a plain step does not wait for the device (``OptimizerState.may_defer`` of
        :mod:`dd.correction.optimizer_state`): what is wrong with it is raised by a later forward,
        step, :meth:`state_dict`, :meth:`evaluate` or :meth:`detach`, and it changed no weight,
        shadow or momentum.

        Warns:
            DivergenceWarning: once, if the correction has begun to feed back on itself.
            UnattachedWarning: once, if neither :meth:`attach` nor :meth:`detach` was called.

        Example:
            >>> noise = dd.NoiseModel.fit(X, y)
            >>> optimizer = dd.DecoupledDescent(model, lr="auto", noise=noise)
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = criterion(model(X), y)
            ...     loss.backward()
            ...     return loss
            >>> losses = [optimizer.step(closure).item() for step in range(3)]
            >>> losses[-1] < losses[0]
            True
        """
        if self._policy is not None:
            return self._step_searched(closure, self._policy)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is None and self._store().lacks_gradients():
                # A closure that skipped its batch.
                self.drop_forward()
        for group in self.param_groups:
            check_rate(group["lr"])
        if self._attachment is None:
            require_no_shadow(self)
            self._is_plain = self._is_plain or has_told_plain(self._store())
            self._move([])
            return loss
        refuse_capture("step()")
        attached_step(self._attachment, self._store(), self._watches, self._damping, self._move)
        self._watches.tell(self._attachment.oversight)
        return loss

    def _step_searched(self, closure: Callable[[], Any] | None, policy: Policy) -> Any:
        require_closure(closure)
        attachment = self._required('step() with lr="auto"')
        refuse_capture("step()")
        assert closure is not None
        try:
            if self.stopped:
                return step_after_stop(self.drop_forward, closure)
            return LineStep(attachment, self._store(), policy, stops=self._stops)(closure)
        except BaseException:
            self.drop_forward()
            raise

    def _forward(self) -> Forward | None:
        attachment, defers = self._attachment, self._policy is None
        if attachment is None or attachment.trial is not None:
            return None if attachment is None else attachment.trial
        store, watches = self._store(), self._watches
        return TrainingForward(attachment, store, watches, self._seed, defers=defers)

    def _store(self) -> OptimizerState:
        return OptimizerState(self.state, self.param_groups)

    def _move(self, updates: list[ShadowUpdate], refusal: Tensor | None = None) -> None:
        scales = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaling = Scaling(refusal, *scales)
        for group in self.param_groups:
            params: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor | None] = []
            sparse = self._init_group(group, params, gradients, buffers)
            moved = GroupTensors(params, gradients, buffers, sparse)
            move_group(group, moved, self.state, updates, scaling)
