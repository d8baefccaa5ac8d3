"""Displacements of what all samples share, moved by the optimizers that move it.

Biases and head go by the derivative of their optimizer's own step
(:mod:`dd.rules.linearised`), the decoupled weight along the component means by the response that is
identified of it. Section 11 of ``docs/theory.md``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.capture import StepGradients
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadow_step import StepMeasures
from dd.rules.followed_states import own_states
from dd.rules.linearised import (
    GRADIENT,
    PARAMETER,
    has_derivative,
    names_of_linear_rules,
    step_derivative,
)
from dd.rules.response import Response
from dd.rules.response_shadows import SIGNAL, moved_shadows, shadowed_names, signal_key
from dd.rules.scaled_steps import is_skipped, unscaling
from dd.support.growth import grown

__all__ = ["SharedSteps"]

# Keys, in a parameter's state, of what its optimizer's last step left.
_LEFT = "left."

Derivative = dict[str, dict[str, Tensor]]


class SharedSteps:
    """Moves displacements as the optimizers' steps move parameters.

    Args:
        attachment: with a corrected head.
        store: what is kept of each parameter.
        optimizers: all that train the model.

    Raises:
        ValueError: if one moves a shared parameter by a rule that has no derivative.
    """

    def __init__(
        self,
        attachment: Attachment,
        store: OptimizerState,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        assert attachment.shared is not None
        self._attachment, self._store = attachment, store
        self._parts = [(p, key) for p, key in attachment.shared.parts if key != SIGNAL]
        self._derivatives: dict[Tensor, Derivative] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._signal: Tensor | None = None
        for optimizer in optimizers:
            if self.holds(optimizer) and not has_derivative(optimizer):
                raise ValueError(
                    f"dd.decouple: head=True follows the head and biases by the rules of "
                    f"{names_of_linear_rules()}, and {type(optimizer).__name__} moves one of them; "
                    "give these to one of the former, or use head=False"
                )

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the shared parameters that an optimizer is about to move.

        Raises:
            RuntimeError: if one is moved twice for one forward, on gradients of no forward, or with
                another state of the optimizer than its last step left.
        """
        attachment = self._attachment
        if is_skipped(optimizer):
            return
        is_idle = not attachment.pending and not self._gradients
        for group, parameter in self._held(optimizer):
            if parameter.grad is None:
                continue
            if parameter in self._derivatives:
                raise RuntimeError(
                    "dd.decouple: an optimizer of the head or of biases steps twice for one step "
                    "of the decoupled layer's; head=True follows one step of each a forward"
                )
            if is_idle and bool(parameter.grad.count_nonzero()):
                raise RuntimeError(
                    f"dd.decouple: {type(optimizer).__name__} steps on gradients of no training "
                    "forward that head=True has seen; call zero_grad() after every step"
                )
            self._take_up(optimizer, parameter)
            gradient = parameter.grad.detach() * unscaling(optimizer)
            self._derivatives[parameter] = step_derivative(optimizer, group, parameter, gradient)
            if is_idle:
                self._move(parameter, None)
        self._move_due()

    def take(self, found: StepMeasures) -> None:
        """Find what drives the displacements in the step of the decoupled weight that is due."""
        shared, count = self._attachment.shared, self._attachment.samples.count
        assert shared is not None
        pushes: StepGradients = found.own
        assert pushes.signal is not None
        assert found.shared is not None
        assert count is not None
        read, write = self._store.read, self._store.write
        shared.make(read, write, count, pushes.signal)
        noise = self._attachment.noise
        units = None if noise is None else noise.units
        rows = shared.shadow_gradients(pushes, found.shared, float(found.scale), read, units)
        # What did not step for the forward before has not moved.
        self._gradients = {p: gradient for p, key, _, gradient in rows if key != SIGNAL}
        (self._signal,) = [gradient for _, key, _, gradient in rows if key == SIGNAL]
        self._move_due()

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the head, and what its optimizer keeps, as a step leaves them."""
        shared = self._attachment.shared
        if shared is None or not self.holds(optimizer):
            return
        shared.remember_weight()
        for _, parameter in self._held(optimizer):
            state = self._store.of(parameter)
            for name, value in own_states(optimizer, parameter).items():
                state[f"{_LEFT}{name}"] = value.clone()

    def move_weight(self, response: Response, *, averages: Sequence[int]) -> None:
        """Move the decoupled weight's displacements along the component means.

        Args:
            response: of its optimizer.
            averages: positions of the averages of the gradients that are kept.
        """
        state = self._store.of(self._attachment.weight)
        shadow, gradient = state.get(SIGNAL), self._signal
        self._signal = None
        if shadow is None:
            return
        # A direction takes the place of a bin.
        names = shadowed_names(response, averages)
        keys = {name: signal_key(name) for name in names}
        for key in [k for k in state if k.startswith(f"{SIGNAL}.") and k not in keys.values()]:
            del state[key]
        kept = {name: state.get(key) for name, key in keys.items()}
        before = {
            name: torch.zeros_like(shadow) if value is None else grown(value, len(shadow))
            for name, value in kept.items()
        }
        parts = {name: value.permute(2, 0, 1) for name, value in before.items()}
        driven = torch.zeros_like(shadow) if gradient is None else gradient.to(shadow)
        moved = moved_shadows(parts, driven.permute(2, 0, 1), response, by_bin=False)
        for name, value in moved.items():
            state[keys[name]] = value.permute(1, 2, 0).contiguous()

    def _take_up(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        """Look at what an optimizer keeps of a parameter: what was zeroed has no displacement.

        Raises:
            RuntimeError: if something is neither zero, nor gone, nor what the last step left.
        """
        state = self._store.of(parameter)
        for name, value in own_states(optimizer, parameter).items():
            left, key = state.get(f"{_LEFT}{name}"), _key(self._key_of(parameter), name)
            if left is None or torch.equal(value, left):
                continue
            if bool(value.count_nonzero()):
                raise RuntimeError(
                    f"dd.decouple: {name!r} in the optimizer's state of the head or of a bias is "
                    "not what the last step left, and the displacements that head=True keeps do "
                    "not fit it. Load the states of model, optimizer and tracker together; to "
                    "begin the optimizer's state anew, clear it or set it to zero."
                )
            if key in state:
                state[key] = torch.zeros_like(state[key])

    def drop(self) -> None:
        """Forget steps that were begun."""
        self._derivatives.clear()
        self._gradients.clear()
        self._signal = None

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer moves a shared parameter beside the decoupled weight."""
        return any(True for _ in self._held(optimizer))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the displacements, by the names of their parameters."""
        return {
            name: {key: value.clone() for key, value in self._store.of(parameter).items()}
            for name, parameter in self._named()
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other parameters.
        """
        names = [name for name, _ in self._named()]
        if sorted(state) != sorted(names):
            raise ValueError(
                f"dd.decouple: the state follows {sorted(state) or 'no head'}, this tracker "
                f"{sorted(names)}; load it into a tracker with the same head="
            )
        for name, parameter in self._named():
            own = {k: v.to(parameter.device, copy=True) for k, v in state[name].items()}
            self._store.state[parameter] = own

    def _named(self) -> list[tuple[str, Tensor]]:
        shared = self._attachment.shared
        assert shared is not None
        linear = {"layer": shared.layer, "head": shared.head}
        found = {
            f"{where}.{name}": parameter
            for where, module in linear.items()
            for name, parameter in module.named_parameters(recurse=False)
        }
        own = [parameter for parameter, _ in self._parts]
        return [(n, p) for n, p in found.items() if any(p is other for other in own)]

    def _held(self, optimizer: torch.optim.Optimizer) -> Any:
        """Shared parameters of an optimizer, each with its group."""
        own = [parameter for parameter, _ in self._parts]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if any(parameter is other for other in own):
                    yield group, parameter

    def _move_due(self) -> None:
        for parameter in [p for p in self._derivatives if p in self._gradients]:
            self._move(parameter, self._gradients.pop(parameter))

    def _move(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Move the displacements of a parameter and of its optimizer's state."""
        key = self._key_of(parameter)
        derivative, state = self._derivatives.pop(parameter), self._store.of(parameter)
        shadow: Tensor | None = state.get(key)
        if shadow is None:
            return
        kept = {name: state.get(_key(key, name)) for name in derivative} | {GRADIENT: gradient}
        known = {n: grown(v, len(shadow)) for n, v in kept.items() if v is not None}
        moved = {}
        for name, parts in derivative.items():
            value = torch.zeros_like(shadow)
            for source, factor in parts.items():
                if source in known:
                    value.addcmul_(known[source].to(shadow), factor.to(shadow))
            moved[_key(key, name)] = value
        state.update(moved)

    def _key_of(self, parameter: Tensor) -> str:
        (key,) = [key for other, key in self._parts if other is parameter]
        return key


def _key(key: str, name: str) -> str:
    return key if name == PARAMETER else f"{key}.{name}"
