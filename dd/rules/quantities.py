"""What a step of an optimizer is made of: quantities, some of which have shadows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dd.functional.response import NoiseBins, UnitProducts

__all__ = [
    "AVERAGE_RATES",
    "GRADIENT",
    "UPDATE",
    "WEIGHT",
    "Combination",
    "OptimizerStep",
    "after_step",
    "average_name",
    "change_name",
    "changes",
    "state_name",
]

# Names of quantities that have shadows: the weight, the gradient that the optimizer saw, its
# exponential averages, and tensors of the optimizer's state before and after the step.
WEIGHT, GRADIENT = "weight", "gradient"
_STATE, _AFTER, _CHANGE = "state.", " after step", " change"
# And of what a step adds to the weight.
UPDATE = "update"
AVERAGE_RATES = (0.9, 0.99)


def average_name(position: int) -> str:
    """Name of the exponential average of the gradients at one of :data:`AVERAGE_RATES`."""
    return f"average_{position}"


def state_name(key: str) -> str:
    """Name of a tensor of the optimizer's state before a step."""
    return f"{_STATE}{key}"


def after_step(name: str) -> str:
    """Name of a tensor of the optimizer's state after a step."""
    return f"{name}{_AFTER}"


def change_name(key: str) -> str:
    """Name of what a step adds to a tensor of the optimizer's state."""
    return f"{state_name(key)}{_CHANGE}"


def changes(change: str, name: str) -> bool:
    """Whether something that a step adds is added to this quantity."""
    return change == (UPDATE if name == WEIGHT else f"{name}{_CHANGE}")


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """What one step of an optimizer did to the decoupled weight, all of shape (k, d).

    Attributes:
        before: the weight.
        after: the weight.
        gradient: V, as it came from the backward pass, up to a scale that applies to all of it.
        states_before: tensors of this shape in the optimizer's state of the weight.
        states_after: likewise.
        averages: exponential averages of V up to this step, by their positions in
            :data:`AVERAGE_RATES`.
        directions: orthonormal, in which the gradients are no noise, shape (d, m), or None.
        bins: of the noise, or None where there is one, or directions are not known.
        pools_units: whether the optimizer keeps something of each input that all units share, as
            second moments that are factored into rows and columns.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    states_before: Mapping[str, Tensor]
    states_after: Mapping[str, Tensor]
    averages: Mapping[int, Tensor]
    directions: Tensor | None
    bins: NoiseBins | None = None
    pools_units: bool = False

    def products(self, *, averages: bool, afters: Sequence[str]) -> UnitProducts:
        """Of the weight, the gradient, and what the step found and changed.

        Args:
            averages: whether also of the averages.
            afters: keys of tensors of the state of which also as the step leaves them.
        """
        found = {WEIGHT: self.before, GRADIENT: self.gradient, UPDATE: self.after - self.before}
        for key, after in self.states_after.items():
            before = self.states_before.get(key)
            found[change_name(key)] = after if before is None else after - before
            if before is not None:
                found[state_name(key)] = before
        found |= self.named_averages() if averages else {}
        return UnitProducts(found | self.named_afters(afters))

    def named_averages(self) -> dict[str, Tensor]:
        """The averages by their names."""
        return {average_name(position): value for position, value in self.averages.items()}

    def named_afters(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the state after the step, by their names."""
        return {after_step(state_name(key)): self.states_after[key] for key in keys}


@dataclass(frozen=True, eq=False)
class Combination:
    """Something that a step adds, as a combination of quantities that have shadows.

    Attributes:
        names: of the quantities.
        coefficients: one a quantity and unit, shape (p, k), or across units, shape (p, k, k).
        by_bin: those for the noise of each bin, shape (p, B, k); None where they are the same.
    """

    names: list[str]
    coefficients: Tensor
    by_bin: Tensor | None = None
