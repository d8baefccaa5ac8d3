"""The shadows of a weight that an optimizer moves by a response of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dd.correction.decay import StepMap
from dd.correction.shadows import KEY, KeptShadows, ShadowTerms
from dd.functional.response import combined
from dd.rules.quantities import (
    AVERAGE_RATES,
    GRADIENT,
    WEIGHT,
    Combination,
    after_step,
    average_name,
    state_name,
)
from dd.rules.response import Response
from dd.samples.placement import Placement
from dd.support.blocks import row_blocks

__all__ = [
    "SIGNAL",
    "ResponseShadows",
    "moved_shadows",
    "shadow_key",
    "shadowed_names",
    "signal_key",
]

# Key, in the decoupled weight's state, of its displacements along the component means.
SIGNAL = "signal_shadow"


def shadow_key(name: str) -> str:
    """Key, in the state of the decoupled weight, of the shadow of a quantity."""
    return KEY if name == WEIGHT else f"{KEY}.{name}"


def signal_key(name: str) -> str:
    """Key, likewise, of the displacements of a quantity along the component means."""
    return SIGNAL if name == WEIGHT else f"{SIGNAL}.{name}"


def shadowed_names(response: Response, averages: Sequence[int]) -> list[str]:
    """Quantities that have shadows after a step, the weight first.

    Args:
        response: of the optimizer.
        averages: positions of the averages of the gradients that are kept.
    """
    kept = [average_name(position) for position in averages]
    return [WEIGHT, *kept, *(state_name(key) for key in response.states)]


class ResponseShadows(KeptShadows):
    """Shadows of the weight, of averages of its gradients, and of the optimizer's own state."""

    def move(
        self,
        state: dict[str, Any],
        placement: Placement | None,
        terms: ShadowTerms | None,
        response: Response,
        *,
        averages: Sequence[int],
    ) -> None:
        """Move them with a step.

        Args:
            state: of the decoupled weight, with its shadows made.
            placement: the samples of the step; None for all.
            terms: what drives the shadow of the gradient; None for a step on no gradient.
            response: of the optimizer.
            averages: positions of the averages of the gradients that are kept.
        """
        names = shadowed_names(response, averages)
        keys = [shadow_key(name) for name in names]
        if placement is not None and placement.rows is not None:
            self._keep(state, keys)
            self.begin(state, placement, keys)
            self._move_rows(state, names, placement, terms, response)
            return
        self.flush(state)
        self._keep(state, keys)
        self.keys = keys
        self._move_all(state, names, terms, response)

    def _keep(self, state: dict[str, Any], keys: list[str]) -> None:
        """Make shadows of what begins to be followed, and forget what ends to be."""
        known = [key for key in state if key.startswith(f"{KEY}.")]
        ended = [key for key in known if key not in keys]
        if any(key not in state for key in keys):
            self.flush(state)
        for key in ended:
            self.release(state, key)
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(state[KEY])

    def _move_all(
        self,
        state: dict[str, Any],
        names: list[str],
        terms: ShadowTerms | None,
        response: Response,
    ) -> None:
        shadow: Tensor = state[KEY]
        bins, count, width = shadow.shape
        for rows in row_blocks(count, bins * width, shadow.device):
            some = {name: state[shadow_key(name)][:, rows] for name in names}
            gradient = None
            if terms is not None:
                gradient = terms.gradient_of(rows, terms.noise.relative_mass)
            for name, value in _moved(some, gradient, terms, response).items():
                some[name].copy_(value)

    def _move_rows(
        self,
        state: dict[str, Any],
        names: list[str],
        placement: Placement,
        terms: ShadowTerms | None,
        response: Response,
    ) -> None:
        rows = placement.rows
        assert rows is not None
        assert placement.rows_on_cpu is not None
        shadow: Tensor = state[KEY]
        width = shadow.shape[-1]
        parts = _basis(names, shadow, by_unit=response.is_by_unit)
        total = parts[0].shape[1]
        some = {
            name: torch.cat([state[shadow_key(name)][:, rows], part], 1)
            for name, part in zip(names, parts, strict=True)
        }
        gradient = None
        if terms is not None:
            mass = terms.noise.relative_mass
            present = terms.gradient_of(slice(None), None if mass is None else mass[rows])
            gradient = torch.cat([present, present.new_zeros(total, width)])
        moved = _moved(some, gradient, terms, response)
        for name, value in moved.items():
            state[shadow_key(name)][:, rows] = value[:, : len(rows)]
        step = torch.cat([moved[name][:, len(rows) :] for name in names], -1)
        others = step[:, width:] if len(names) > 1 else None
        if response.is_by_unit:
            kept = StepMap(step[:, :width], factors=others)
        else:
            kept = StepMap(step[:, :width], others)
        self.passed(state, kept, placement.rows_on_cpu)


def _basis(names: Sequence[str], shadow: Tensor, *, by_unit: bool) -> list[Tensor]:
    """A basis of what moves with the shadows: where a step takes it is the map of the absent.

    Args:
        names: of q quantities, the weight first.
        shadow: of the weight, shape (B, n, k).
        by_unit: whether every unit of the other quantities is taken to the same unit of all alone,
            so that one row of ones tells them all.

    Returns:
        The part of each quantity, shape (B, p, k); with ``by_unit`` (B, k + q - 1, k).
    """
    bins, _, width = shadow.shape
    count = len(names)
    if not by_unit:
        whole = torch.eye(count * width, dtype=shadow.dtype, device=shadow.device)
        return list(whole.expand(bins, -1, -1).chunk(count, -1))
    parts = [shadow.new_zeros(width + count - 1, width) for _ in names]
    parts[0][:width].fill_diagonal_(1.0)
    for at, part in enumerate(parts[1:]):
        part[width + at] = 1.0
    return [part.expand(bins, -1, -1) for part in parts]


def _moved(
    before: Mapping[str, Tensor],
    gradient: Tensor | None,
    terms: ShadowTerms | None,
    response: Response,
) -> dict[str, Tensor]:
    """The shadows of some rows after a step, each of shape (B, u, k).

    Args:
        before: the shadows of these rows, by the names of what they belong to.
        gradient: G of these rows, scaled by their relative masses, shape (u, k).
        terms: as in :meth:`ResponseShadows.move`.
        response: of the optimizer.
    """
    shadow = before[WEIGHT]
    driven = torch.zeros_like(shadow)
    if terms is not None and gradient is not None:
        driven = terms.shadow_gradient(shadow, slice(None), gradient)
    return moved_shadows(before, driven, response)


def moved_shadows(
    before: Mapping[str, Tensor], gradient: Tensor, response: Response, *, by_bin: bool = True
) -> dict[str, Tensor]:
    """Shadows after a step, each of shape (B, u, k).

    Args:
        before: the step, by the names of what they belong to.
        gradient: the shadow of the gradient.
        response: of the optimizer.
        by_bin: whether these are of the bins of the noise.
    """
    shadow, known = before[WEIGHT], {**before, GRADIENT: gradient}
    found: dict[str, Tensor] = {}
    for position, rate in enumerate(AVERAGE_RATES):
        name = average_name(position)
        if name in before:
            found[name] = known[name] = torch.lerp(known[GRADIENT], before[name], rate)
    for key, change in response.states.items():
        name = state_name(key)
        found[name] = known[after_step(name)] = _with(before[name], change, known, by_bin=by_bin)
    found[WEIGHT] = _with(shadow, response.weight, known, by_bin=by_bin)
    return found


def _with(
    start: Tensor, change: Combination, known: Mapping[str, Tensor], *, by_bin: bool
) -> Tensor:
    coefficients = change.coefficients
    if by_bin and change.by_bin is not None:
        coefficients = change.by_bin.unsqueeze(-2)
    return combined([known[name] for name in change.names], coefficients, start)
