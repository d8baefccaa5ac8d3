"""Which point of a linear family a step moves to: the policies behind ``lr="auto"``."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Family", "LineSearch", "Point", "Policy"]


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a linear family with J directions.

    Attributes:
        a: what is left of the decoupled weights.
        s: step of the decoupled layer along each direction, shape (J,), float64 on the CPU.
        t: step of every other parameter along each direction, likewise.
    """

    a: float
    s: Tensor
    t: Tensor

    @classmethod
    def still(cls, directions: int) -> "Point":
        """The point where nothing moves."""
        return cls(1.0, *torch.zeros(2, directions, dtype=torch.float64))

    @classmethod
    def of(cls, vector: Tensor) -> "Point":
        """The point with coordinates (a, s, t), shape (1 + 2J,)."""
        vector = vector.detach().double().cpu()
        s, t = vector[1:].chunk(2)
        return cls(float(vector[0]), s, t)

    @property
    def vector(self) -> Tensor:
        """Coordinates (a, s, t), shape (1 + 2J,), float64 on the CPU."""
        return torch.cat([torch.tensor([self.a], dtype=torch.float64), self.s, self.t])

    @property
    def is_finite(self) -> bool:
        """Whether every coordinate is finite."""
        return bool(self.vector.isfinite().all())


class Family(Protocol):
    """The states that a step may lead to, a linear family around the present one.

    Attributes:
        directions: J. Direction 0 is that of the gradient, 1 the last step's displacement.
        loss: that of the present state.
        sizes: root mean squares of R and of what each direction makes of it, shape (1 + J,),
            float64.
    """

    directions: int
    loss: float
    sizes: Tensor

    def evaluate(self, point: Point) -> tuple[float, Tensor]:
        """Loss at a point and its derivative in (a, s, t), shape (1 + 2J,), float64.

        Where either is not finite the loss is infinite and the derivative zero.
        """


class Policy(Protocol):
    """Chooses where a step leads.

    Attributes:
        keeps_displacement: whether the last step's displacement is a direction of the next one.
    """

    keeps_displacement: bool

    def choose(self, family: Family, memory: dict[str, float]) -> Point:
        """Return the point to move to.

        Args:
            family: where the step may lead.
            memory: what the policy keeps from step to step; saved with the optimizer's state.
        """


class LineSearch:
    """Lowest loss over a, s_0 and t_0, by a few steps of BFGS.

    Args:
        evaluations: of the loss a step, about.
    """

    keeps_displacement = False

    def __init__(self, evaluations: int = 12) -> None:
        self._evaluations = evaluations

    def choose(self, family: Family, memory: dict[str, float]) -> Point:
        """Return the best point seen, as :class:`Policy` describes."""
        size, moved = family.sizes[:2].tolist()
        unit = size / moved if moved > 0 else 1.0
        search = _Search(
            family, torch.tensor([1.0, unit, memory.get("t_unit", unit)], dtype=torch.float64)
        )
        start = torch.tensor([0.0, memory.get("s", 0.0), memory.get("t", 0.0)], dtype=torch.float64)
        x = (start / search.units).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=self._evaluations,
            max_eval=self._evaluations,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: search.evaluate(x))
        memory["s"], memory["t"] = float(search.best.s[0]), float(search.best.t[0])
        memory["t_unit"] = max(abs(memory["t"]), 1e-3 * unit)
        return search.best


class _Search:
    """The loss in terms of (log a, s_0, t_0) over their units; remembers the lowest."""

    def __init__(self, family: Family, units: Tensor) -> None:
        self.units, self._family = units, family
        self.best, self._lowest = Point.still(family.directions), family.loss

    def evaluate(self, x: Tensor) -> float:
        """Return the loss, and leave its derivative in ``x.grad``."""
        log_a, s, t = (x.detach() * self.units).tolist()
        still = Point.still(self._family.directions)
        try:
            still.s[0], still.t[0], a = s, t, math.exp(log_a)
        except OverflowError:
            a = math.inf
        point = Point(a, still.s, still.t)
        loss, derivative = self._family.evaluate(point)
        if loss < self._lowest:
            self.best, self._lowest = point, loss
        width = self._family.directions
        chosen = torch.stack([derivative[0] * a, derivative[1], derivative[1 + width]])
        x.grad = (chosen * self.units).nan_to_num(0.0)
        return loss
