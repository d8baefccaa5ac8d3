"""The hook at a corrected layer, and what it takes a forward to be."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

from dd.support.weak_hook import WeakHook

__all__ = ["UNTRACEABLE", "Correct", "Forward", "ForwardHook", "OutputHook", "sweep", "take_over"]

UNTRACEABLE = (
    "DecoupledDescent looks at every batch and every gradient outside of the graph: compile "
    "without fullgraph=True, or only what lies between the decoupled layer and the loss"
)

# Weights along the first direction of the fingerprints, as steps before a detachment left them.
_DETACHED: "weakref.WeakKeyDictionary[nn.Module, Tensor]" = weakref.WeakKeyDictionary()

# Takes a layer, its inputs and its output; returns the corrected output, or None to leave it.
Correct = Callable[[nn.Module, Tensor, Tensor], Tensor | None]


class Forward(Protocol):
    """One forward of an attached model: what its hooks do to the outputs of the two layers."""

    def at_layer(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the decoupled layer, shape (m, k); None where it stays."""

    def at_head(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the head, shape (m, C); None where it stays."""


class ForwardHook:
    """Passes a layer's forward to whoever corrects it, and to no copy of either.

    A deep copy or an unpickled copy of the model gets an inert hook, as does the model itself once
    the owner of the correction is gone.

    Args:
        correct: a method, whose owner may be forgotten; None for an inert hook.
        give_up: a method of the owner's that leaves the layer to another, or None.

    Attributes:
        left: the weight along the first direction of the fingerprints as the last step left it,
            shape (k,), or None; it outlives the owner.
    """

    left: Tensor | None = None

    def __init__(
        self, correct: Correct | None = None, give_up: Callable[[], None] | None = None
    ) -> None:
        self._is_inert = correct is None
        self._give_up = None if give_up is None else weakref.WeakMethod(give_up)
        self._method = None if correct is None else weakref.WeakMethod(correct)

    def give_up(self) -> None:
        """Let the owner of the correction, if it lives, leave the layer to another."""
        give_up = None if self._give_up is None else self._give_up()
        if give_up is not None:
            give_up()

    def let_go(self, layer: nn.Module) -> None:
        """Remember, outside of a layer that is decoupled no more, what weights are left."""
        if self.left is not None:
            _DETACHED[layer] = self.left

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
        if self._is_inert or not layer.training:
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
        correct = None if self._method is None else self._method()
        if correct is None:
            return None
        inputs = args[0] if args else kwargs["input"]
        if not torch.is_inference_mode_enabled():
            return correct(layer, inputs, output)
        # What is remembered of the samples must not be made of inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            return correct(layer, inputs, output)


class OutputHook(WeakHook):
    """Marks what a model returns, where something within took the mark away.

    Its method takes a tensor and returns it marked.
    """

    @property
    def is_owned(self) -> bool:
        """Whether the owner of the method lives."""
        return self.method is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output, marked in training; compiled code keeps marks as they are."""
        if self.is_inert or not module.training or torch.compiler.is_compiling():
            return None
        mark = self.method
        return None if mark is None else tree_map_only(Tensor, mark, output)


def take_over(layer: nn.Module) -> list[Tensor]:
    """Remove the hooks of optimizers attached to a layer; return the weights that they left."""
    left = []
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(hook, ForwardHook):
            hook.give_up()
            layer._forward_hooks.pop(key, None)
            layer._forward_hooks_with_kwargs.pop(key, None)
            if hook.left is not None:
                left.append(hook.left)
    detached = _DETACHED.pop(layer, None)
    return left if detached is None else [*left, detached]


def sweep(module: nn.Module) -> None:
    """Remove what optimizers that are gone have left at a model's end."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, OutputHook) and not hook.is_owned:
            del module._forward_hooks[key]
