"""One decoupled layer: how it is found, hooked, corrected and read."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dd.curvature import Backward, Curvature, build
from dd.dual import DualLevel, carry_tangent, split_tangent
from dd.functional import at_least_single, corrected_preactivation
from dd.gradient_check import require_same_weight, require_unedited
from dd.head import Scores, SharedParameters
from dd.layers import find_layer
from dd.noise import LARGEST_GRAM, NoiseModel
from dd.oversight import Oversight
from dd.sample_order import SampleOrder

if TYPE_CHECKING:
    from dd.optimizer import DecoupledDescent

__all__ = ["Attachment", "Capture", "ForwardHook"]


class ForwardHook:
    """Passes a layer's forward to the optimizer that owns it, and to no copy of either.

    A deep copy or an unpickled copy of the model gets an inert hook, as does the model itself once
    its optimizer is gone.

    Args:
        optimizer: the owner.
        head: whether the layer is the head and not the decoupled one.
    """

    def __init__(self, optimizer: "DecoupledDescent | None" = None, *, head: bool = False) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._head = head

    @property
    def optimizer(self) -> "DecoupledDescent | None":
        """The optimizer, while it lives."""
        return None if self._optimizer is None else self._optimizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardHook":
        """Return an inert hook."""
        return ForwardHook()

    def __reduce__(self) -> tuple[type["ForwardHook"], tuple[()]]:
        """Pickle as an inert hook."""
        return ForwardHook, ()

    # The lazy form of torch.compiler.disable, as torch's optimizers use it: the public one imports
    # the whole compiler with this module.
    @_disable_dynamo
    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Return the corrected output, or None to leave it as it is."""
        optimizer = self.optimizer
        if optimizer is None:
            return None
        inputs = args[0] if args else kwargs["input"]
        correct = optimizer._correct_scores if self._head else optimizer._correct
        return correct(layer, inputs, output)


class Capture:
    """One training forward, and what its backward delivers.

    Attributes:
        gradient: ∂L/∂R, shape (n, k), or None before the backward pass.
        tangent: derivative of the gradient along the probe, or None.
        signal: coordinates of the samples along the component means, shape (n, m), where the head
            is corrected.
        scores: what the head saw and said, where it is corrected.
    """

    signal: Tensor | None = None
    scores: Scores | None = None

    def __init__(
        self, preactivation: Tensor, estimator: Curvature, generator: torch.Generator
    ) -> None:
        self.gradient: Tensor | None = None
        self.tangent: Tensor | None = None
        self._estimating = False
        self._estimator = estimator
        self._observed = estimator.observe(preactivation.detach(), generator)
        self._edge = get_gradient_edge(preactivation)
        self._level = DualLevel() if estimator.forward_mode else None
        _listen(preactivation, self.receive)

    def outgoing(self, preactivation: Tensor) -> Tensor:
        """Return what the following layers receive: R, with the probe as tangent where needed."""
        if self._level is None:
            return preactivation
        # An in-place operation downstream changes the tangent too; the probe must survive it.
        return carry_tangent(preactivation, self._observed.clone())

    @property
    def node(self) -> Any:
        """Node of R in the autograd graph."""
        return self._edge.node

    @contextmanager
    def undisturbed(self) -> Iterator[tuple[Tensor, GradientEdge]]:
        """Let gradients pass by R uncounted; yields what was observed, and R's place."""
        self._estimating = True
        try:
            yield self._observed, self._edge
        finally:
            self._estimating = False

    def receive(self, gradient: Tensor) -> Tensor | None:
        """Keep a gradient that reached R; return what goes on to the layer's weights."""
        if self._estimating:
            return None
        tangent = None
        if self._level is not None:
            gradient, tangent = split_tangent(gradient)
            self._level.close()
        if self.gradient is None:
            self.gradient, self.tangent = gradient, tangent
        else:
            # A second backward pass finds the level closed, so that its curvature is lost.
            self.gradient, self.tangent = self.gradient + gradient, None
        return gradient if self._level is not None else None

    def follow(self, scores: Tensor, corrected: Tensor, features: Tensor) -> None:
        """Take down what the head saw and said.

        Args:
            scores: the head's plain output, shape (n, C).
            corrected: what the loss receives, shape (n, C).
            features: inputs of the head, and 1 for its bias, shape (n, f).

        Raises:
            RuntimeError: if the scores do not depend on the pre-activations.
        """
        # What follows may change the scores in place.
        values = split_tangent(corrected.detach())[0].clone()
        self.scores = Scores(values, features, self._jacobian(scores))
        _listen(corrected, self.receive_scores)

    def _jacobian(self, scores: Tensor) -> Tensor:
        directions = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
        # The head's derivative is wanted, not that of its tangent.
        with self.undisturbed(), forward_ad._set_fwd_grad_enabled(False):
            try:
                rows = [
                    torch.autograd.grad(
                        scores,
                        self._edge,
                        direction.expand(scores.shape),
                        retain_graph=True,
                        allow_unused=True,
                    )[0]
                    for direction in directions
                ]
            except RuntimeError as error:
                raise RuntimeError(
                    "DecoupledDescent: head=True differentiates every score in the forward pass, "
                    f"and something between the decoupled layer and the head does not allow it "
                    f"({error}). Use head=False, or no activation checkpointing there."
                ) from error
        if any(row is None for row in rows):
            raise RuntimeError(
                "DecoupledDescent: the head's output does not depend on the decoupled layer's; "
                "name the layer that computes the scores with head="
            )
        return torch.stack(rows, 1).detach()

    def receive_scores(self, gradient: Tensor) -> None:
        """Keep a gradient that reached the scores."""
        if self._estimating or self.scores is None:
            return
        gradient = split_tangent(gradient.detach())[0]
        earlier = self.scores.gradient
        self.scores.gradient = gradient if earlier is None else earlier + gradient

    def curvature(self) -> Tensor:
        """Estimate H, shape (k, k), once the gradient is there."""
        assert self.gradient is not None
        # Differentiating the gradient again passes by R and must not count as a gradient.
        with self.undisturbed() as (observed, edge):
            return self._estimator.estimate(observed, Backward(self.gradient, self.tangent, edge))

    def close(self) -> None:
        """Drop the share in the forward-mode level."""
        if self._level is not None:
            self._level.close()


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


def _listen(tensor: Tensor, receive: Callable[[Tensor], Tensor | None]) -> None:
    """Pass the gradient of ``tensor`` to a method, as long as its owner lives."""
    # The graph must not own the capture, which owns an edge of the graph.
    listener = weakref.WeakMethod(receive)

    def deliver(gradient: Tensor) -> Tensor | None:
        receive = listener()
        return None if receive is None else receive(gradient)

    tensor.register_hook(deliver)


class Attachment:
    """The bond between an optimizer and one linear layer of a module.

    Attributes:
        module: the model.
        name: dotted name of the layer.
        layer: the decoupled layer.
        noise: the noise model; None until the first training forward fits it.
        pending: the training forward that the next step consumes.
        order: recognises the training batch.
        oversight: warns where the theory is strained or the component ids are wrong.
        expected: the weight along the order's direction after the last step, shape (k,), or None.
        shared: the parameters that all samples share, where they are corrected too.

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
    ) -> None:
        self.module = module
        self._bins = bins
        self.name, self.layer = find_layer(module, layer)
        self.noise = self._given_noise = noise
        self.estimator = build(curvature, noise)
        self.pending: Capture | None = None
        self.order = SampleOrder()
        self.oversight = Oversight()
        self.expected: Tensor | None = None
        self._handles: list[Any] = []
        directions = None if noise is None else noise.mean_directions
        self.shared = (
            None if head is False else SharedParameters(module, self.layer, head, directions)
        )
        if not isinstance(self.layer.weight, nn.Parameter) or not self.layer.weight.requires_grad:
            raise ValueError(
                f"DecoupledDescent: the weight of layer {self.name!r} must be a trainable "
                "parameter of its own (not frozen, not parametrised)"
            )
        if noise is not None and noise.dimension != self.layer.in_features:
            raise ValueError(
                f"DecoupledDescent: the noise model describes {noise.dimension} inputs, but layer "
                f"{self.name!r} takes {self.layer.in_features}; fit it on what this layer receives"
            )
        _require_matching_means(noise, corrects_head=self.shared is not None)
        for hook in self.layer._forward_hooks.values():
            if isinstance(hook, ForwardHook) and hook.optimizer is not None:
                raise ValueError(
                    f"DecoupledDescent: layer {self.name!r} is attached to an optimizer already; "
                    "call detach() on that one first"
                )

    def register(self, optimizer: "DecoupledDescent") -> None:
        """Install the forward hooks."""
        hook = ForwardHook(optimizer)
        self._handles = [self.layer.register_forward_hook(hook, with_kwargs=True)]
        if self.shared is not None:
            hook = ForwardHook(optimizer, head=True)
            head = self.shared.head
            self._handles.append(head.register_forward_hook(hook, with_kwargs=True))

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

    def forget(self) -> None:
        """Forget the samples and the weights that the state belonged to."""
        self.drop()
        self.order.forget()
        self.expected = None
        if self.shared is not None:
            self.shared.forget()

    def drop(self) -> None:
        """Forget the pending training forward."""
        if self.pending is not None:
            self.pending.close()
            self.pending = None

    def preactivation(self, inputs: Tensor, output: Tensor, shadow: Tensor | None) -> Tensor:
        """Check a training batch and return R, shape (n, k).

        Raises:
            ValueError: if the batch is not a matrix, or of another size than the shadows.
            RuntimeError: if its samples are not those of the shadows, in their order.
        """
        self._check_batch(inputs, shadow)
        if shadow is None:
            return output
        self.order.check(inputs)
        return corrected_preactivation(output, shadow)

    def capture(self, inputs: Tensor, preactivation: Tensor, seed: int, *, first: bool) -> Tensor:
        """Begin a training forward and return what the following layers receive.

        Raises:
            RuntimeError: if a training forward is pending, a trainable layer comes before, the
                samples are others, or the weight was changed since the last step.
        """
        if self.pending is not None:
            raise RuntimeError(
                f"DecoupledDescent: layer {self.name!r} saw two training forwards before a step "
                "(or is used twice in one, which is outside the theory). Run forwards that lead to "
                "no step under model.eval() or torch.no_grad(); after a skipped or interrupted "
                "step call optimizer.drop_forward()."
            )
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
        if first:
            self.order.check(inputs)
        if self.expected is not None and self.order.direction is not None:
            require_same_weight(self.layer.weight.detach(), self.order.direction, self.expected)
            if self.shared is not None:
                self.shared.check_weight()
        if first or self.noise is None:
            self._fit_noise(inputs)
            self.oversight.look(self, inputs.detach())
        generator = torch.Generator(preactivation.device).manual_seed(seed)
        self.pending = Capture(preactivation, self.estimator, generator)
        return self.oversight.outgoing(self, self.pending.outgoing(preactivation), seed)

    def check_gradient(self, capture: Capture) -> None:
        """Check that the weight's gradient is the one that the capture's backward delivered.

        Raises:
            RuntimeError: if it is not.
        """
        weight, order = self.layer.weight, self.order
        assert weight.grad is not None
        assert capture.gradient is not None
        assert order.direction is not None
        assert order.projection is not None
        require_unedited(weight.grad, capture.gradient.detach(), order.direction, order.projection)

    def check_head_gradient(self, capture: Capture) -> None:
        """The same for the parameters that are shared by all samples.

        Raises:
            RuntimeError: if a gradient is another than the one delivered.
        """
        if self.shared is None or capture.scores is None or capture.scores.gradient is None:
            return
        assert capture.gradient is not None
        self.shared.check_gradients(capture.gradient.detach(), capture.scores)

    def remember_weight(self) -> None:
        """Remember the weights that a step leaves."""
        if self.order.direction is not None:
            weight = at_least_single(self.layer.weight.detach())
            self.expected = weight @ self.order.direction.to(weight)
        if self.shared is not None:
            self.shared.remember_weight()

    def _fit_noise(self, inputs: Tensor) -> None:
        noise = self._given_noise
        if noise is None and min(inputs.shape) > LARGEST_GRAM:
            noise = NoiseModel.isotropic(inputs)
        elif noise is None:
            noise = NoiseModel.fit(inputs, bins=self._bins)
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        self.noise = noise.to(self.layer.weight.device, dtype)

    def _check_batch(self, inputs: Tensor, shadow: Tensor | None) -> None:
        if inputs.dim() != 2:
            raise ValueError(
                f"DecoupledDescent: layer {self.name!r} must receive one row a sample, shape "
                f"(n, {self.layer.in_features}), in training; got {tuple(inputs.shape)}"
            )
        given = self._given_noise
        known = None if given is None else given.num_samples
        expected = known if shadow is None else shadow.shape[1]
        if expected is not None and expected != len(inputs):
            raise ValueError(
                f"DecoupledDescent: layer {self.name!r} expects the whole training set of "
                f"{expected} samples in every training forward, got a batch of {len(inputs)}. "
                "Feed the full batch; call model.eval() before evaluating on other data."
            )

    def _earlier_parameters(self) -> str:
        names = []
        for name, parameter in self.module.named_parameters():
            if parameter is self.layer.weight:
                break
            if parameter.requires_grad:
                names.append(name)
        return ", ".join(names[:4]) or "or requires a gradient itself"
