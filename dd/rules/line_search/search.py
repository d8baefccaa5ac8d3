"""Which point of a linear family a step moves to: the policy behind ``lr="auto"``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dd.support.newton import minimise

__all__ = ["NO_MOVE", "Family", "LineSearch", "Point", "Policy"]


@dataclass(frozen=True)
class Point:
    """A point of the linear family, equation (5).

    Attributes:
        keep: a, what is left of the decoupled weights.
        step: s, the step along the layer's gradient.
        drift: r, along the curvature times the weights.
        newton: q, along the inverse curvature times the gradient.
        head: t, the step of every other parameter along its gradient.
    """

    keep: float
    step: float
    drift: float
    newton: float
    head: float

    @classmethod
    def of(cls, vector: Tensor) -> "Point":
        """The point with coordinates (a, s, r, q, t), shape (5,)."""
        return cls(*vector.tolist())

    @property
    def vector(self) -> Tensor:
        """Coordinates (a, s, r, q, t), shape (5,), float64 on the CPU."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @property
    def is_finite(self) -> bool:
        """Whether every coordinate is finite."""
        return all(math.isfinite(x) for x in astuple(self))


NO_MOVE = Point(1.0, 0.0, 0.0, 0.0, 0.0)


class Family(Protocol):
    """The states that a step may lead to, a linear family around the present one.

    Attributes:
        loss: that of the present state.
        shape: of R, (n, k).
        gram: mean products of R, S, RP and SP⁺ with one another, shape (4, 4), float64 on the CPU.
        head_sizes: Euclidean norms of θ and of u.
    """

    loss: float
    shape: tuple[int, int]
    gram: Tensor
    head_sizes: tuple[float, float]

    def evaluate(self, point: Point) -> tuple[float, Tensor]:
        """Loss at a point and its derivative in (a, s, r, q, t), shape (5,), float64.

        Where either is not finite the loss is infinite and the derivative zero.
        """

    def evaluate_plain(self, point: Point) -> tuple[float, Tensor]:
        """The same without any correction."""


class Policy(Protocol):
    """Chooses where a step leads."""

    def choose(self, family: Family, memory: dict[str, float]) -> Point:
        """Return the point to move to.

        Args:
            family: where the step may lead.
            memory: what the policy keeps from step to step; saved with the optimizer's state.
                ``"informed"`` tells whether the weights know of the signal, ``"searching"`` that
                from now on every step goes down, ``"lost"`` that no signal was found,
                ``"excess"`` by how much the plain loss at the point exceeds the tracked one, over
                the loss of a constant prediction or, where that is not known, the highest so far.
        """


# A start that knows nothing of the signal is left by rotations (docs/theory.md, section 8): their
# angle, the root mean square that pre-activations are given, where activations bend, and the most
# of them.
_ANGLE, _SIZE, _MOST_ROTATIONS = 0.9, 2.0, 20

# The first step is nearly a quarter turn where that alone informs the weights: then the initial
# ones would only add noise.
_FIRST_ANGLE, _FIRST_SIZE = 1.55, 1.0

# Weights know of the signal when their loss is below the first share of the best constant
# prediction's: then the lowest loss is no longer the one without any weights. Or when rotations
# lead below the second, and no lower for a while.
_INFORMED, _STALLED, _PATIENCE = 0.9, 0.95, 6

# What rotations leave uncorrected grows with them: without any signal the loss falls, in 50 of
# them, by a share of up to 0.55 of the square root of width over samples.
_LEFT = 0.55

# Steps that keep a fixed share of the weights, so that what was learnt from poor predictions is
# forgotten.
_RENEWALS, _KEPT = 12, 0.7

# Losses of a ratio below this are the same but for rounding.
_SAME = 1.001

# Shares of the head's unit among which the lowest loss is chosen, at a quarter turn and without any
# weights; and at other turns. What a weak start tells of the head is noise, and a head moved by its
# own length loses the signs with which units take to different clusters.
_HEAD_STEPS = (0.0, 0.03, 0.1, 0.3, 1.0)
_SHORT_HEAD_STEPS = _HEAD_STEPS[:-1]


_Evaluate = Callable[[Point], tuple[float, Tensor]]


class LineSearch:
    """Turns the weights until they know of the signal, renews them, and then goes down.

    Args:
        evaluations: of the loss in a step, at most.
    """

    def __init__(self, evaluations: int = 14) -> None:
        self._evaluations = evaluations

    def choose(self, family: Family, memory: dict[str, float]) -> Point:
        """Return the best point seen, as :class:`Policy` describes."""
        rotations, renewals = memory.get("rotations", 0.0), memory.get("renewals", 0.0)
        memory["highest"] = max(memory.get("highest", 0.0), abs(family.loss))
        if memory.get("lost"):
            return NO_MOVE
        if not memory.get("informed"):
            without, point = _without_weights(family)
            constant = memory["constant"] = min(memory.get("constant", math.inf), without)
            memory["informed"] = 0.0
            if rotations > 0 and not _is_informed(family, constant, memory):
                return self._turned_again(family, point, memory)
            if rotations == 0 and family.loss >= _INFORMED * constant:
                memory["rotations"] = 1.0
                return _first_turn(family, constant)
            memory["informed"] = 1.0
        # Weights that many rotations led to were renewed on the way; informed ones are the user's.
        if rotations == 1 and renewals < _RENEWALS:
            memory["renewals"] = renewals + 1
            loss, point = self._renewed(family, memory)
            if loss < math.inf:
                return point
        memory["searching"] = 1.0
        return self._lowest(family, NO_MOVE, [0, 1, 2, 3, 4], memory)[1]

    def _turned_again(self, family: Family, without: Point, memory: dict[str, float]) -> Point:
        if memory["rotations"] >= _MOST_ROTATIONS:
            # A search from here would only find what the correction has left.
            memory["lost"] = 1.0
            return without
        memory["rotations"] += 1
        loss, point = _rotation(family, _ANGLE, _SIZE, _SHORT_HEAD_STEPS)
        return point if loss < math.inf else NO_MOVE

    def _renewed(self, family: Family, memory: dict[str, float]) -> tuple[float, Point]:
        away = (1 - _KEPT) * _layer_units(family)[1].item()
        start = Point(_KEPT, away, 0.0, 0.0, 0.0)
        return self._lowest(family, start, [1, 3, 4], memory)

    def _lowest(
        self, family: Family, start: Point, moving: list[int], memory: dict[str, float]
    ) -> tuple[float, Point]:
        """The lowest loss found from a start, along some of the coordinates, and where."""
        head = torch.tensor([_head_unit(family)], dtype=torch.float64)
        units = torch.cat([_layer_units(family), head])
        fixed = start.vector

        def at(x: Tensor) -> Tensor:
            return fixed.index_copy(0, torch.tensor(moving), x * units[moving])

        def scaled(evaluate: _Evaluate, x: Tensor) -> tuple[float, Tensor]:
            loss, derivative = evaluate(Point.of(at(x)))
            return loss, (derivative * units)[moving]

        tracked, plain = partial(scaled, family.evaluate), partial(scaled, family.evaluate_plain)

        def larger(x: Tensor) -> tuple[float, Tensor]:
            return max(tracked(x), plain(x), key=lambda found: found[0])

        # Going up the gradient would fit the noise of the samples that the correction leaves.
        floors = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, 0.0], dtype=torch.float64)[moving]
        origin = (fixed / units).nan_to_num(0.0, 0.0, 0.0)[moving]
        loss, found = minimise(tracked, origin, floors, evaluations=self._evaluations)
        memory["excess"] = 0.0
        if plain(found)[0] > _SAME * loss:
            # Memory of the samples can only lower the plain loss: where that is higher the
            # correction takes away more than there is, and a search would go there for it.
            loss, found = minimise(larger, origin, floors, evaluations=self._evaluations)
            scale = memory.get("constant") or memory["highest"]
            excess = (loss - tracked(found)[0]) / scale if scale > 0 else 0.0
            # A plain loss that is not finite is no estimate of anything.
            memory["excess"] = excess if math.isfinite(excess) else math.inf
        return loss, Point.of(at(found))


def _is_informed(family: Family, constant: float, memory: dict[str, float]) -> bool:
    loss, rotations = family.loss, memory["rotations"]
    if loss < memory.get("lowest", math.inf):
        memory["lowest"], memory["lowest_at"] = loss, rotations
    # At the end of all rotations what falls ever more slowly has stalled as well.
    stalls = rotations - memory["lowest_at"] >= _PATIENCE or rotations >= _MOST_ROTATIONS
    samples, width = family.shape
    # One turn leaves next to nothing.
    left = 1 - _LEFT * math.sqrt(width / samples) if rotations > 1 else 1.0
    stalled = stalls and memory["lowest"] < min(_STALLED, left) * constant
    informed = loss < min(_INFORMED, left) * constant or stalled
    # Memory of the samples can only lower the plain loss. Where that is higher, the training loss
    # is low because the correction takes more away than there is, as with a wrong noise model.
    # Before the weights have moved the two are one, but for rounding.
    return informed and family.evaluate_plain(NO_MOVE)[0] < _SAME * loss


def _layer_units(family: Family) -> Tensor:
    """Steps that change pre-activations by their own size, shape (4,); 0 where none does."""
    sizes = family.gram.diagonal().sqrt()
    units = (sizes[0] / sizes).nan_to_num(0.0, 0.0, 0.0)
    units[0] = 1.0
    return units


def _without_weights(family: Family) -> tuple[float, Point]:
    """The lowest loss seen without any weights, and where."""
    return _best(family, Point(0.0, 0.0, 0.0, 0.0, 0.0), _HEAD_STEPS)


def _first_turn(family: Family, constant: float) -> Point:
    loss, point = _rotation(family, _FIRST_ANGLE, _FIRST_SIZE, _HEAD_STEPS)
    if loss >= _INFORMED * constant:
        loss, point = _rotation(family, _ANGLE, _SIZE, _SHORT_HEAD_STEPS)
    return point if loss < math.inf else NO_MOVE


def _rotation(
    family: Family, angle: float, size: float, head_steps: Sequence[float]
) -> tuple[float, Point]:
    """Turn R toward S by an angle, as if they were of equal size, and give it a size."""
    present, along = family.gram[0, 0].sqrt().item(), family.gram[1, 1].sqrt().item()
    if present > 0 and along > 0:
        cosine = family.gram[0, 1].item() / (present * along)
        ratio = math.tan(angle)
        size = size / math.sqrt(1 + ratio**2 + 2 * ratio * cosine)
        keep, step = size / present, size * ratio / along
    else:
        # Weights or gradients of zero: there is but one direction, or the head's alone.
        keep, step = 1.0, size / along if along > 0 else 0.0
    return _best(family, Point(keep, step, 0.0, 0.0, 0.0), head_steps)


def _best(family: Family, point: Point, head_steps: Sequence[float]) -> tuple[float, Point]:
    """The lowest loss at a point with one of some steps of the head, and where."""
    unit = _head_unit(family)
    points = [replace(point, head=share * unit) for share in head_steps]
    return min(((family.evaluate(p)[0], p) for p in points), key=lambda found: found[0])


def _head_unit(family: Family) -> float:
    """A large step of the head: three tenths of the loss, at most its own length if it has one."""
    size, slope = family.head_sizes
    if slope == 0.0:
        return 0.0
    return min(0.3 * abs(family.loss) / slope**2, size / slope if size > 0 else math.inf)
