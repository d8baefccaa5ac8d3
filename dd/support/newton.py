"""Minimisation over a handful of numbers, by values and first derivatives."""

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["minimise"]

# In units: of a difference of derivatives, and of the first and the longest step.
_DIFFERENCE = 0.02
_FIRST_RADIUS, _LONGEST_RADIUS, _SHORTEST_RADIUS = 1.0, 4.0, 1e-4

# Relative to the value: a step that promises less is not taken.
_LEAST_GAIN = 1e-6

Function = Callable[[Tensor], tuple[float, Tensor]]


def minimise(
    function: Function,
    start: Tensor,
    floors: Tensor,
    *,
    evaluations: int,
) -> tuple[float, Tensor]:
    """Go down from a start by Newton steps in a trust region.

    The second derivatives are differences of first ones at the start and are kept up to date by
    symmetric rank-one updates (Nocedal and Wright, Numerical Optimization, section 6.2). Negative
    curvature counts as positive, so that saddles are left.

    Args:
        function: value and derivative, shape (m,), at a point; a wall where one is not finite.
        start: shape (m,), in units of which one is a large step; raised to the floors.
        floors: lower bounds, shape (m,); -inf for none.
        evaluations: of the function, at most, and at least m + 1, at and around the start.

    Returns:
        The lowest value that was seen and its point; infinity and the start if that is a wall.
    """
    state = _State(function, torch.maximum(start, floors), floors)
    if not state.value < torch.inf:
        return state.lowest
    state.look_around()
    radius = _FIRST_RADIUS
    for _ in range(evaluations - 1 - len(start)):
        step = state.newton_step()
        length = float(step.abs().max())
        if length > radius:
            step = step * (radius / length)
        promised = -float(state.derivative @ step)
        if not promised > _LEAST_GAIN * max(abs(state.value), 1e-3):
            break
        if state.try_step(step):
            radius = min(2 * radius, _LONGEST_RADIUS) if length >= radius else radius
        else:
            radius = 0.35 * min(length, radius)
        if radius < _SHORTEST_RADIUS:
            break
    return state.lowest


class _State:
    """The present point, the quadratic model around it, and the lowest of all that were seen."""

    def __init__(self, function: Function, start: Tensor, floors: Tensor) -> None:
        self._function, self._floors = function, floors
        self.point = start
        self.lowest = torch.inf, start
        self.value, self.derivative = self._evaluate(start)
        self._hessian = torch.eye(len(start), dtype=start.dtype)

    def _evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        value, derivative = self._function(point)
        if not (math.isfinite(value) and bool(derivative.isfinite().all())):
            return torch.inf, torch.zeros_like(point)
        if value < self.lowest[0]:
            self.lowest = value, point
        return value, derivative

    def look_around(self) -> None:
        """Take second derivatives."""
        rows = []
        for direction in torch.eye(len(self.point), dtype=self.point.dtype):
            value, derivative = self._evaluate(self.point + _DIFFERENCE * direction)
            row = (derivative - self.derivative) / _DIFFERENCE
            usable = value < torch.inf and bool(row.isfinite().all())
            rows.append(row if usable else direction / _DIFFERENCE)
        hessian = torch.stack(rows)
        self._hessian = (hessian + hessian.mT) / 2

    def newton_step(self) -> Tensor:
        """The minimum of the model above the floors."""
        values, vectors = torch.linalg.eigh(self._hessian)
        sizes = values.abs()
        sizes = sizes.clamp_min(1e-3 * float(sizes.max()) + 1e-12)
        model = (vectors * sizes) @ vectors.mT
        lowest = self._floors - self.point
        bounded = lowest.isfinite().nonzero().flatten().tolist()
        # Going to the floors one by one may stop at the wrong ones; all choices are few.
        choices = (c for size in range(len(bounded) + 1) for c in combinations(bounded, size))
        steps = [self._step_to_floors(model, lowest, list(choice)) for choice in choices]
        steps = [step for step in steps if bool((step >= lowest).all())]
        still = torch.zeros_like(lowest)
        return min([still, *steps], key=lambda s: float(s @ (self.derivative + model @ s / 2)))

    def _step_to_floors(self, model: Tensor, lowest: Tensor, floored: list[int]) -> Tensor:
        """The minimum of the model where some coordinates are at their floors."""
        step = torch.zeros_like(lowest)
        step[floored] = lowest[floored]
        free = torch.ones(len(step), dtype=torch.bool)
        free[floored] = False
        if free.any():
            slope = (self.derivative + model @ step)[free]
            step[free] = -torch.linalg.solve(model[free][:, free], slope)
        return step

    def try_step(self, step: Tensor) -> bool:
        """Move if that is lower; learn from it in any case."""
        point = torch.maximum(self.point + step, self._floors)
        value, derivative = self._evaluate(point)
        if not value < torch.inf:
            return False
        self._learn(point - self.point, derivative - self.derivative)
        if not value < self.value:
            return False
        self.point, self.value, self.derivative = point, value, derivative
        return True

    def _learn(self, step: Tensor, change: Tensor) -> None:
        missing = change - self._hessian @ step
        scale = float(missing @ step)
        if abs(scale) > 1e-8 * float(missing.norm() * step.norm()):
            self._hessian = self._hessian + torch.outer(missing, missing) / scale
