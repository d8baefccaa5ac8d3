"""Where the decoupled layer's shadows are kept, read and moved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dd.decay import DecayLog
from dd.functional import shadow_gradient
from dd.noise import NoiseModel
from dd.samples import Placement

__all__ = ["Push", "ShadowUpdate", "Shadows", "keeping"]

KEY, BUFFER_KEY = "shadow", "shadow_momentum_buffer"


@dataclass(frozen=True, eq=False)
class ShadowUpdate:
    """A tensor that is stepped with a parameter, by the same rule.

    Attributes:
        parameter: whose group gives the rule.
        tensor: is moved in place.
        gradient: what it descends.
        buffer: its momentum, or None before the first step with any.
        finish: receives the momentum after the step.
        parameter_gradient: what the parameter itself descends where that is not its own gradient.
    """

    parameter: Tensor
    tensor: Tensor
    gradient: Tensor
    buffer: Tensor | None
    finish: Callable[[Tensor | None], None]
    parameter_gradient: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Push:
    """What moves the shadows in one step.

    Attributes:
        weight: the decoupled weight.
        gradient: G, one row a distinct sample, shape (u, k).
        curvature: H, shape (k, k).
        noise: λ, τ and the relative masses.
        damping: ρ.
        parameter_gradient: as in :class:`ShadowUpdate`.
    """

    weight: Tensor
    gradient: Tensor
    curvature: Tensor
    noise: NoiseModel
    damping: float
    parameter_gradient: Tensor | None = None

    def shadow_gradient(
        self, shadow: Tensor, gradient: Tensor, relative_mass: Tensor | None
    ) -> Tensor:
        """∇Q of some shadows (B, u, k) with gradients (u, k) and masses (u,)."""
        noise = self.noise
        return shadow_gradient(
            shadow,
            gradient,
            self.curvature,
            noise.eigenvalues,
            noise.mass,
            self.damping,
            relative_mass,
        )


class Shadows:
    """Shadows Q, shape (B, n, k), in the optimizer's state of the decoupled weight.

    Samples absent from a batch decay when they appear again (:mod:`dd.decay`).
    """

    def __init__(self) -> None:
        self._log: DecayLog | None = None
        self._with_momentum = False

    def forget(self) -> None:
        """Take the state as up to date, after another one was loaded."""
        self._log = None

    def flush(self, state: dict[str, Any]) -> None:
        """Bring every sample up to date.

        Args:
            state: of the decoupled weight.
        """
        if self._log is None or self._log.is_empty:
            return
        shadow = state[KEY]
        if not self._with_momentum:
            self._log.flush(shadow)
            return
        width = shadow.shape[-1]
        moved = self._log.flush(torch.cat([shadow, state[BUFFER_KEY]], -1))
        shadow.copy_(moved[..., :width])
        state[BUFFER_KEY].copy_(moved[..., width:])

    def of(self, state: dict[str, Any], placement: Placement) -> Tensor:
        """Shadows of a batch's rows, brought up to date, shape (B, m, k)."""
        shadow: Tensor = state[KEY]
        if placement.index is None:
            self.flush(state)
            return shadow
        self._bring(state, placement)
        return shadow[:, placement.index]

    def _bring(self, state: dict[str, Any], placement: Placement) -> None:
        log, rows, on_cpu = self._log, placement.rows, placement.rows_on_cpu
        if log is None or log.is_empty or rows is None or on_cpu is None:
            return
        if log.prefers_flush(on_cpu):
            self.flush(state)
            return
        shadow = state[KEY]
        if not self._with_momentum:
            shadow[:, rows] = log.catch_up(shadow[:, rows], on_cpu)
            return
        width, buffer = shadow.shape[-1], state[BUFFER_KEY]
        moved = log.catch_up(torch.cat([shadow[:, rows], buffer[:, rows]], -1), on_cpu)
        shadow[:, rows] = moved[..., :width]
        buffer[:, rows] = moved[..., width:]

    def make(
        self, state: dict[str, Any], noise: NoiseModel, num_samples: int, gradient: Tensor
    ) -> None:
        """Make shadows of zero for samples that have none yet.

        Args:
            state: of the decoupled weight.
            noise: gives the bins and the precision.
            num_samples: n.
            gradient: G, for the width and the device.
        """
        shape = (len(noise.eigenvalues), num_samples, gradient.shape[1])
        if KEY not in state:
            state[KEY] = gradient.new_zeros(shape, dtype=noise.eigenvalues.dtype)
        missing = num_samples - state[KEY].shape[1]
        if missing == 0:
            return
        for key in (KEY, BUFFER_KEY):
            if state.get(key) is not None:
                more = state[key].new_zeros(shape[0], missing, shape[2])
                state[key] = torch.cat([state[key], more], 1)
        if self._log is not None:
            self._log.grow(num_samples)

    def update(
        self, state: dict[str, Any], placement: Placement, push: Push, *, momentum: bool
    ) -> ShadowUpdate:
        """How the shadows move with a step.

        Args:
            state: of the decoupled weight, with its shadows made.
            placement: the samples of the step.
            push: what moves them.
            momentum: whether the group of the decoupled weight has momentum.
        """
        if placement.rows is None or placement.rows_on_cpu is None:
            return self._update_all(state, push)
        if self._log is None:
            self._log = DecayLog(state[KEY].shape[1])
        if self._with_momentum != momentum:
            self.flush(state)
            self._with_momentum = momentum
        # Rows of other processes have not been in a forward here.
        self._bring(state, placement)
        return self._update_rows(state, placement.rows, placement.rows_on_cpu, push)

    def _update_all(self, state: dict[str, Any], push: Push) -> ShadowUpdate:
        self.flush(state)
        moved = push.shadow_gradient(state[KEY], push.gradient, push.noise.relative_mass)
        buffer, keep = state.get(BUFFER_KEY), keeping(state, BUFFER_KEY)
        return ShadowUpdate(push.weight, state[KEY], moved, buffer, keep, push.parameter_gradient)

    def _update_rows(
        self, state: dict[str, Any], rows: Tensor, rows_on_cpu: Tensor, push: Push
    ) -> ShadowUpdate:
        shadow, before = state[KEY], state.get(BUFFER_KEY)
        bins, _, width = shadow.shape
        # Beside the batch's rows the rule moves a basis: where it goes is the map of the absent.
        start, pace = _basis(bins, width, shadow, momentum=self._with_momentum)
        some = torch.cat([shadow[:, rows], start], 1)
        buffer = None if before is None else torch.cat([before[:, rows], pace], 1)
        still = push.gradient.new_zeros(start.shape[1], width)
        mass = push.noise.relative_mass
        if mass is not None:
            mass = torch.cat([mass[rows], mass.new_ones(len(still))])
        moved = push.shadow_gradient(some, torch.cat([push.gradient, still]), mass)

        def finish(pace: Tensor | None) -> None:
            count = len(rows)
            shadow[:, rows] = some[:, :count]
            basis = some[:, count:]
            if self._with_momentum:
                assert pace is not None
                if state.get(BUFFER_KEY) is None:
                    state[BUFFER_KEY] = torch.zeros_like(shadow)
                state[BUFFER_KEY][:, rows] = pace[:, :count]
                basis = torch.cat([basis, pace[:, count:]], -1)
            assert self._log is not None
            if self._log.append(basis, rows_on_cpu, width):
                self.flush(state)

        return ShadowUpdate(push.weight, some, moved, buffer, finish, push.parameter_gradient)


def _basis(bins: int, width: int, like: Tensor, *, momentum: bool) -> tuple[Tensor, Tensor]:
    """Positions and momenta of a basis of (position, momentum), each of shape (B, p, k)."""
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    nothing = torch.zeros_like(identity)
    start, pace = [identity, nothing], [nothing, identity]
    count = 2 if momentum else 1
    return (
        torch.cat(start[:count]).expand(bins, -1, -1),
        torch.cat(pace[:count]).expand(bins, -1, -1),
    )


def keeping(state: dict[str, Any], key: str) -> Callable[[Tensor | None], None]:
    """Return what keeps a momentum in a state after a step."""

    def keep(buffer: Tensor | None) -> None:
        if buffer is not None:
            state[key] = buffer

    return keep
