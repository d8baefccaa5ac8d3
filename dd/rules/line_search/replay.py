"""Calling a closure again and again as if it had been called once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dd.correction.hook import UNTRACEABLE

__all__ = ["UNLIKE_FIRST", "ClosureReplay", "batch_norms", "forward_replaced", "own_statistics"]

UNLIKE_FIRST = (
    "DecoupledDescent: a later call of the closure did not do as the first: run the model in train "
    "mode on all training samples, differentiate the loss and return it"
)


@contextmanager
def forward_replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer, its hooks included, run another forward for a while; never as compiled code."""
    own, replacement = vars(layer), "forward"
    before = own.get(replacement)

    def eager(input: Tensor) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNTRACEABLE)
        return _untraced(forward, input)

    own[replacement] = eager
    try:
        yield
    finally:
        if before is None:
            del own[replacement]
        else:
            own[replacement] = before


# Compiled code must not take up what stands in for a layer for a while.
@_disable_dynamo
def _untraced(forward: Callable[..., Any], input: Tensor) -> Any:
    return forward(input)


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch normalisations that average their statistics over steps."""
    found = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in found if norm.training and norm.track_running_stats]


@contextmanager
def own_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch normalisations hold the statistics of their latest forward alone for a while.

    An average over steps lags behind where these are few and large.
    """
    norms = batch_norms(module)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class ClosureReplay:
    """What every call of a closure finds alike: random numbers, buffers, empty gradients.

    To be made before the first call.

    Args:
        module: whose buffers are kept.
        parameters: whose gradients are kept.
        device: whose random numbers are kept, beside the CPU's.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        self._device, self._buffers = device, list(module.buffers())
        pairs = ((norm.running_mean, norm.running_var) for norm in batch_norms(module))
        self._statistics = {id(buffer) for pair in pairs for buffer in pair}
        seen = {id(p): p for p in [*module.parameters(), *parameters]}
        self._parameters = list(seen.values())
        self._random_before = _random_state(device)
        self._random_after = self._random_before
        self._kept: list[Tensor] = []
        self._gradients: list[Tensor | None] = []

    def take(self) -> None:
        """Take down what the first call left."""
        self._random_after = _random_state(self._device)
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._gradients = [p.grad for p in self._parameters]

    @contextmanager
    def call(self, *, keeps_statistics: bool = False) -> Iterator[None]:
        """Around each further call.

        Args:
            keeps_statistics: whether the statistics that the call leaves in batch normalisations
                are kept, and found by further calls.
        """
        self._put_gradients([None] * len(self._parameters))
        _set_random_state(self._random_before, self._device)
        try:
            yield
            if keeps_statistics:
                for number, buffer in enumerate(self._buffers):
                    if id(buffer) in self._statistics:
                        self._kept[number] = buffer.clone()
        finally:
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)

    def finish(self) -> None:
        """Leave random numbers and gradients as the first call left them."""
        _set_random_state(self._random_after, self._device)
        self._put_gradients(self._gradients)

    def _put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
