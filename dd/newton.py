"""Minimisation over a handful of numbers, by values and first derivatives."""

from collections.abc import Callable

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
) -> Tensor:
    """Go down from a start by Newton steps in a trust region.

    The second derivatives are differences of first ones at the start and are kept up to date by
    symmetric rank-one updates (Nocedal and Wright, Numerical Optimization, section 6.2). Negative
    curvature counts as positive, so that saddles are left.

    Args:
        function: value and derivative, shape (m,), at a point; an infinite value is a wall.
        start: shape (m,), in units of which one is a large step.
        floors: lower bounds, shape (m,); -inf for none.
        evaluations: of the function, at most; m + 1 of them at and around the start.

    Returns:
        The lowest point that was seen, the start among them.
    """
    state = _State(function, start, floors)
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
    return state.point


class _State:
    """The lowest point so far, and the quadratic model around it."""

    def __init__(self, function: Function, start: Tensor, floors: Tensor) -> None:
        self._function, self._floors = function, floors
        self.point = start.clone()
        self.value, self.derivative = function(start)
        self._hessian = self._differences()

    def _differences(self) -> Tensor:
        width = len(self.point)
        rows = []
        for direction in torch.eye(width, dtype=self.point.dtype):
            value, derivative = self._function(self.point + _DIFFERENCE * direction)
            wall = direction / _DIFFERENCE
            finite = value < torch.inf
            rows.append((derivative - self.derivative) / _DIFFERENCE if finite else wall)
        hessian = torch.stack(rows)
        return (hessian + hessian.mT) / 2

    def newton_step(self) -> Tensor:
        """The minimum of the model, without what would go below the floors."""
        values, vectors = torch.linalg.eigh(self._hessian)
        sizes = values.abs()
        sizes = sizes.clamp_min(1e-3 * float(sizes.max()) + 1e-12)
        model = (vectors * sizes) @ vectors.mT
        free = torch.ones(len(self.point), dtype=torch.bool)
        while True:
            step = torch.zeros_like(self.point)
            if free.any():
                inner = model[free][:, free]
                step[free] = -torch.linalg.solve(inner, self.derivative[free])
            blocked = (self.point <= self._floors) & (step < 0)
            if not blocked.any():
                return step
            free &= ~blocked

    def try_step(self, step: Tensor) -> bool:
        """Move if that is lower; learn from it in any case."""
        point = torch.maximum(self.point + step, self._floors)
        value, derivative = self._function(point)
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
