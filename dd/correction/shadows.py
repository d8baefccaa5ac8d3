"""Where the decoupled layer's shadows are kept, read and moved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dd.correction.decay import DecayLog, StepMap
from dd.functional import driven, scaled_by_mass, shadow_decay
from dd.noise.model import NoiseModel
from dd.samples.placement import Placement
from dd.support.blocks import bin_groups, row_blocks
from dd.support.growth import grown

__all__ = [
    "BUFFER_KEY",
    "KEY",
    "KeptShadows",
    "ShadowSlice",
    "ShadowTerms",
    "ShadowUpdate",
    "Shadows",
    "momentum_writer",
]

KEY, BUFFER_KEY = "shadow", "shadow_momentum_buffer"


# Moves tensors in place by their gradients and momenta, and puts momenta where there were none.
Rule = Callable[[list[Tensor], list[Tensor], list[Tensor | None]], None]


@dataclass(frozen=True, eq=False)
class ShadowSlice:
    """A part of a shadow, and how it moves.

    Attributes:
        where: it is, as an index.
        tensor: is moved in place.
        gradient: what it descends.
        buffer: its momentum, or None before the first step with any.
        finish: receives the momentum after the step.
    """

    where: Any
    tensor: Tensor
    gradient: Tensor
    buffer: Tensor | None
    finish: Callable[[Tensor | None], None]

    def move(self, rule: Rule, *, momentum: bool, dense: bool) -> None:
        """Move by a rule.

        Args:
            rule: of the parameter's group.
            momentum: whether it has any.
            dense: whether it takes numbers as they lie in memory, as torch's fused one does.
        """
        split = dense and not self.tensor.is_contiguous()
        tensors, gradients = _bins(self.tensor, split), _bins(self.gradient, split)
        buffers: list[Tensor | None] = []
        if momentum:
            known = self.buffer
            buffers = [None] * len(tensors) if known is None else [*_bins(known, split)]
        rule(tensors, gradients, buffers)
        made = [buffer for buffer in buffers if buffer is not None]
        if momentum and self.buffer is None:
            self.finish(torch.stack(made) if split else made[0])
        else:
            self.finish(self.buffer if momentum else None)


def _bins(tensor: Tensor, split: bool) -> list[Tensor]:
    return list(tensor) if split else [tensor]


@dataclass(frozen=True, eq=False)
class ShadowUpdate:
    """A tensor that is stepped with a parameter, by the same rule.

    Attributes:
        parameter: whose group gives the rule.
        tensor: is moved in place.
        pieces: yields the tensor in pieces, or as a whole. Each piece's gradient is made when it is
            reached.
        parameter_gradient: what the parameter itself descends where that is not its own gradient.
    """

    parameter: Tensor
    tensor: Tensor
    pieces: Callable[[], Iterator[ShadowSlice]]
    parameter_gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """What the whole tensor descends, of its shape."""
        gradient = torch.empty_like(self.tensor)
        for piece in self.pieces():
            gradient[piece.where] = piece.gradient
        return gradient


@dataclass(frozen=True, eq=False)
class ShadowTerms:
    """What moves the shadows in one step.

    Attributes:
        weight: the decoupled weight.
        gradient: G as delivered, one row a distinct sample, shape (u, k).
        curvature: H, shape (k, k).
        noise: λ, τ and the relative masses.
        damping: ρ.
        scale: what G is multiplied by.
        parameter_gradient: as in :class:`ShadowUpdate`.
    """

    weight: Tensor
    gradient: Tensor
    curvature: Tensor
    noise: NoiseModel
    damping: float
    scale: float | Tensor = 1.0
    parameter_gradient: Tensor | None = None

    def shadow_gradient(self, shadow: Tensor, bins: slice, gradient: Tensor) -> Tensor:
        """∇Q of some shadows.

        Args:
            shadow: Q of some bins and samples, shape (b, u, k).
            bins: which these are.
            gradient: :meth:`gradient_of` these samples, shape (u, k).
        """
        rest = (gradient, self._decay[bins], self._mass[bins])
        return driven(shadow, *(part.to(shadow.dtype) for part in rest))

    def gradient_of(self, rows: slice, relative_mass: Tensor | None) -> Tensor:
        """G of some samples with relative masses (n,), each scaled by its own, shape (u, k)."""
        gradient = self.gradient[rows].to(self.noise.eigenvalues.dtype)
        if not isinstance(self.scale, Tensor) and self.scale != 1.0:
            # Of a scaled loss: only the product is sure to be within range.
            gradient = self.scale * gradient
        return scaled_by_mass(gradient, None if relative_mass is None else relative_mass[rows])

    @cached_property
    def _decay(self) -> Tensor:
        return shadow_decay(self.damping * self.curvature, self.noise.eigenvalues)

    @cached_property
    def _mass(self) -> Tensor:
        mass = self.noise.mass
        return self.scale.to(mass) * mass if isinstance(self.scale, Tensor) else mass


class KeptShadows:
    """Shadows Q, shape (B, n, k), and what moves along with them, in the decoupled weight's state.

    Samples absent from a batch decay when they appear again (:mod:`dd.correction.decay`).

    Attributes:
        keys: of the tensors that go through a step's map together, the shadows first.
        follows_layers: whether several layers on the same inputs, or a head of groups, go with it.
    """

    follows_layers = False

    def __init__(self) -> None:
        self.keys = [KEY]
        self._log: DecayLog | None = None

    def forget(self) -> None:
        """Take the state as up to date, after another one was loaded."""
        self._log = None

    def release(self, state: dict[str, Any], key: str) -> None:
        """Forget one of the tensors that move with the shadows.

        Args:
            state: of the decoupled weight.
            key: of the tensor.
        """
        self.flush(state)
        self.keys = [other for other in self.keys if other != key]
        state.pop(key, None)

    def flush(self, state: dict[str, Any]) -> None:
        """Bring every sample up to date.

        Args:
            state: of the decoupled weight.
        """
        if self._log is None or self._log.is_empty:
            return
        if len(self.keys) == 1:
            self._log.flush(state[KEY])
            return
        moved = self._log.flush(torch.cat([state[key] for key in self.keys], -1))
        for key, part in zip(self.keys, moved.chunk(len(self.keys), -1), strict=True):
            state[key].copy_(part)

    def of(self, state: dict[str, Any], placement: Placement) -> Tensor:
        """Shadows of a batch's rows, brought up to date, shape (B, m, k)."""
        shadow: Tensor = state[KEY]
        if placement.index is None:
            self.flush(state)
            return shadow
        self._bring(state, placement)
        return shadow[:, placement.index]

    def _bring(self, state: dict[str, Any], placement: Placement) -> None:
        log, rows_on_cpu = self._log, placement.rows_on_cpu
        if log is None or log.is_empty or rows_on_cpu is None:
            return
        due = log.due(rows_on_cpu)
        if len(due) == 0:
            return
        if log.prefers_flush(due):
            self.flush(state)
            return
        rows = due.to(state[KEY].device)
        if len(self.keys) == 1:
            state[KEY][:, rows] = log.catch_up(state[KEY][:, rows], due)
            return
        moved = log.catch_up(torch.cat([state[key][:, rows] for key in self.keys], -1), due)
        for key, part in zip(self.keys, moved.chunk(len(self.keys), -1), strict=True):
            state[key][:, rows] = part

    def make(
        self, state: dict[str, Any], noise: NoiseModel, num_samples: int, gradient: Tensor
    ) -> None:
        """Make shadows of zero for samples that have none yet.

        Args:
            state: of the decoupled weight.
            noise: gives the bins and the precision.
            num_samples: n, or the number of all rows where samples have several.
            gradient: G, for the width and the device.
        """
        shape = (len(noise.eigenvalues), num_samples, gradient.shape[1])
        if KEY not in state:
            state[KEY] = gradient.new_zeros(shape, dtype=noise.eigenvalues.dtype)
        if state[KEY].shape[1] == num_samples:
            return
        # Not by the keys of the last step, of which there is none after a state was loaded.
        for key in [key for key in state if key in (KEY, BUFFER_KEY) or key.startswith(f"{KEY}.")]:
            if state[key] is not None:
                state[key] = grown(state[key], num_samples, 1)
        if self._log is not None:
            self._log.grow(num_samples)

    def begin(self, state: dict[str, Any], placement: Placement, keys: list[str]) -> None:
        """Prepare a step on some samples, whose rows are brought up to date.

        Args:
            state: of the decoupled weight, with its shadows made.
            placement: the samples of the step.
            keys: of the tensors that the step moves together.
        """
        if self._log is None:
            self._log = DecayLog(state[KEY].shape[1])
        if self.keys != keys:
            self.flush(state)
            self.keys = keys
        # Rows of other processes have not been in a forward here.
        self._bring(state, placement)

    def passed(self, state: dict[str, Any], step: StepMap, rows_on_cpu: Tensor) -> None:
        """Note the map that the absent samples are still to go through.

        Args:
            state: of the decoupled weight.
            step: of all keys together.
            rows_on_cpu: the samples of the step, shape (u,).
        """
        assert self._log is not None
        if self._log.append(step, rows_on_cpu):
            self.flush(state)


class Shadows(KeptShadows):
    """Shadows that SGD moves, and their momentum."""

    follows_layers = True

    def update(
        self, state: dict[str, Any], placement: Placement, push: ShadowTerms, *, momentum: bool
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
        self.begin(state, placement, [KEY, BUFFER_KEY] if momentum else [KEY])
        return self._update_rows(state, placement.rows, placement.rows_on_cpu, push)

    def _update_all(self, state: dict[str, Any], push: ShadowTerms) -> ShadowUpdate:
        self.flush(state)
        shadow: Tensor = state[KEY]
        buffer: Tensor | None = state.get(BUFFER_KEY)

        def pieces() -> Iterator[ShadowSlice]:
            bins, count, width = shadow.shape
            groups = bin_groups(bins, shadow.device)
            for rows in row_blocks(count, bins // len(groups) * width, shadow.device):
                gradient = push.gradient_of(rows, push.noise.relative_mass)
                for group in groups:
                    where = group, rows
                    moved = push.shadow_gradient(shadow[where], group, gradient)
                    pace = None if buffer is None else buffer[where]
                    keep = _keeping_part(state, shadow, where)
                    yield ShadowSlice(where, shadow[where], moved, pace, keep)

        return ShadowUpdate(push.weight, shadow, pieces, push.parameter_gradient)

    def _update_rows(
        self, state: dict[str, Any], rows: Tensor, rows_on_cpu: Tensor, push: ShadowTerms
    ) -> ShadowUpdate:
        shadow, before = state[KEY], state.get(BUFFER_KEY)
        bins, _, width = shadow.shape
        # Beside the batch's rows the rule moves a basis: where it goes is the map of the absent. It
        # takes every unit of the momenta to the same unit alone, so that one row tells them all.
        momentum = len(self.keys) > 1
        start, pace = _basis(bins, width, shadow, momentum=momentum)
        some = torch.cat([shadow[:, rows], start], 1)
        buffer = None if before is None else torch.cat([before[:, rows], pace], 1)
        mass = push.noise.relative_mass
        gradient = push.gradient_of(slice(None), None if mass is None else mass[rows])
        still = gradient.new_zeros(start.shape[1], width)
        moved = push.shadow_gradient(some, slice(None), torch.cat([gradient, still]))

        def finish(pace: Tensor | None) -> None:
            count = len(rows)
            shadow[:, rows] = some[:, :count]
            basis = some[:, count:]
            if momentum:
                assert pace is not None
                if state.get(BUFFER_KEY) is None:
                    state[BUFFER_KEY] = torch.zeros_like(shadow)
                state[BUFFER_KEY][:, rows] = pace[:, :count]
                basis = torch.cat([basis, pace[:, count:]], -1)
            factors = basis[:, width:] if momentum else None
            self.passed(state, StepMap(basis[:, :width], factors=factors), rows_on_cpu)

        piece = ShadowSlice(..., some, moved, buffer, finish)
        return ShadowUpdate(push.weight, some, lambda: iter([piece]), push.parameter_gradient)


def _basis(bins: int, width: int, like: Tensor, *, momentum: bool) -> tuple[Tensor, Tensor]:
    """Positions and momenta of a basis of the positions, and of a momentum of one in all units."""
    start = torch.eye(width + momentum, width, dtype=like.dtype, device=like.device)
    pace = torch.zeros_like(start)
    pace[width:] = 1.0
    return start.expand(bins, -1, -1), pace.expand(bins, -1, -1)


def momentum_writer(state: dict[str, Any], key: str) -> Callable[[Tensor | None], None]:
    """Return what keeps a momentum in a state after a step."""

    def keep(buffer: Tensor | None) -> None:
        if buffer is not None:
            state[key] = buffer

    return keep


def _keeping_part(
    state: dict[str, Any], shadow: Tensor, where: tuple[slice, slice]
) -> Callable[[Tensor | None], None]:
    """Return what keeps the momentum of some bins and rows after the first step with any."""

    def keep(buffer: Tensor | None) -> None:
        if buffer is None:
            return
        if state.get(BUFFER_KEY) is None:
            state[BUFFER_KEY] = torch.zeros_like(shadow)
        kept = state[BUFFER_KEY][where]
        if kept.data_ptr() != buffer.data_ptr():
            kept.copy_(buffer)

    return keep
