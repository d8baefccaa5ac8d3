"""The response of an optimizer to its gradients, identified from the step that it made.

Section 11 of ``docs/theory.md``. The shadow of a quantity is what removing a sample changes of it,
and shadows are linear: where an update is a combination of quantities whose shadows are known, its
shadow is the same combination of theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dd.functional.response import (
    ResponseFit,
    fit_across_units,
    fit_by_unit,
    fit_of_all_units,
    without_directions,
)

__all__ = [
    "AVERAGE_RATES",
    "GRADIENT",
    "WEIGHT",
    "Combination",
    "OptimizerStep",
    "Response",
    "ResponseIdentifier",
    "after_step",
    "average_name",
    "state_name",
]

# Names of quantities that have shadows: the weight, the gradient that the optimizer saw, its
# exponential averages, and tensors of the optimizer's state before and after the step.
WEIGHT, GRADIENT = "weight", "gradient"
_STATE, _AFTER = "state.", " after step"
AVERAGE_RATES = (0.9, 0.99)

# What rounding in single precision leaves unexplained of an update that is a combination, and
# bfloat16 within Muon's iterations, is less; what coordinate-wise optimizers leave is far more.
_EXACT = 1e-4
_EXACT_RIDGE = 1e-9
# As many degrees of freedom leave next to nothing by chance once in 1e8 steps.
_EVIDENCE = 4
# A quantity of which the averages explain this share brings nothing but noise to a regression.
_REDUNDANT = 0.99
# A combination across units must leave this share of what one by unit leaves.
_ACROSS_GAIN = 0.5
# After these steps a form that was ruled out is tried now and then.
_FIRST_STEPS, _EVERY = 8, 16
_NUMBERS_PER_COLUMN = 10


def average_name(position: int) -> str:
    """Name of the exponential average of the gradients at one of :data:`AVERAGE_RATES`."""
    return f"average_{position}"


def state_name(key: str) -> str:
    """Name of a tensor of the optimizer's state before a step."""
    return f"{_STATE}{key}"


def after_step(name: str) -> str:
    """Name of a tensor of the optimizer's state after a step."""
    return f"{name}{_AFTER}"


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """What one step of an optimizer did to the decoupled weight, all of shape (k, d).

    Attributes:
        before: the weight.
        after: the weight.
        gradient: V, as it came from the backward pass, up to a scale that applies to all of it.
        states_before: tensors of this shape in the optimizer's state of the weight.
        states_after: likewise.
        averages: exponential averages of V up to this step, one for each of
            :data:`AVERAGE_RATES`.
        directions: orthonormal, in which the gradients are no noise, shape (d, m), or None.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    states_before: Mapping[str, Tensor]
    states_after: Mapping[str, Tensor]
    averages: Sequence[Tensor]
    directions: Tensor | None

    def quantity(self, name: str) -> Tensor:
        """A quantity by its name."""
        if name == WEIGHT:
            return self.before
        if name == GRADIENT:
            return self.gradient
        for position, average in enumerate(self.averages):
            if name == average_name(position):
                return average
        key = name.removeprefix(_STATE)
        if key.endswith(_AFTER):
            return self.states_after[key.removesuffix(_AFTER)]
        return self.states_before[key]


@dataclass(frozen=True, eq=False)
class Combination:
    """Something that a step adds, as a combination of quantities that have shadows.

    Attributes:
        names: of the quantities.
        coefficients: one a quantity and unit, shape (p, k), or across units, shape (p, k, k).
    """

    names: list[str]
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class Response:
    """How the last step of an optimizer answered to the gradients.

    Attributes:
        exact: whether the update is a combination of known quantities, up to rounding; else its
            mean derivative was found by regression over the inputs of each unit.
        share: of the update's squared size that the combination explains. Low shares are ordinary
            for optimizers that act on every coordinate by itself.
        across_units: whether units answer to each other's gradients.
        weight: what the step adds to the weight.
        states: what it adds to tensors of the optimizer's state, by their keys.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
        >>> criterion(model(X), y).backward()
        >>> optimizer.step()
        >>> tracker.response.exact, tracker.response.across_units
        (False, False)
    """

    exact: bool
    share: float
    across_units: bool
    weight: Combination = field(repr=False)
    states: Mapping[str, Combination] = field(repr=False)


class ResponseIdentifier:
    """Finds the response of one optimizer, step by step.

    Attributes:
        followed: keys of the tensors of the optimizer's state whose shadows are known.
        averages: whether averages of the gradients and their shadows are kept.
    """

    def __init__(self) -> None:
        self.followed: list[str] = []
        self.averages = False
        self._regressed: list[str] = []
        self._lost: list[str] = []
        self._across = False
        self._steps = 0
        self._was_exact = self._found_exact = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far, in plain values."""
        found: dict[str, Any] = {"followed": self.followed, "regressed": self._regressed}
        found = {key: list(names) for key, names in (found | {"lost": self._lost}).items()}
        return found | {
            "averages": self.averages,
            "across": self._across,
            "steps": self._steps,
            "exact": self._was_exact,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.followed, self._lost = list(state["followed"]), list(state["lost"])
        self._regressed = list(state["regressed"])
        self.averages, self._across = state["averages"], state["across"]
        self._steps, self._was_exact = state["steps"], state["exact"]

    @property
    def regresses(self) -> bool:
        """Whether a part of the last step's response was found by regression."""
        return bool(self._regressed) or not self._found_exact

    def forget(self, key: str) -> None:
        """Follow a tensor of the optimizer's state no more, until it is made anew."""
        self.followed = [other for other in self.followed if other != key]
        self._regressed = [other for other in self._regressed if other != key]

    def watched(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of an optimizer's state that may have a shadow."""
        return {key: value for key, value in states.items() if key not in self._lost}

    def identify(self, step: OptimizerStep) -> Response:
        """Find the response of a step.

        Raises:
            RuntimeError: if a tensor of the optimizer's state has vanished.
            ValueError: if the layer has too few inputs to tell.
        """
        moves = not torch.equal(step.after, step.before)
        # Steps at a rate of zero, as at the start of a warm-up, tell nothing.
        self._steps += moves
        self._require_same_states(step)
        exact = self._exact_states(step)
        rest = [key for key in step.states_after if key not in exact]
        known = [state_name(key) for key in exact if key in step.states_before]
        update = step.after - step.before
        fitted = self._exactly(step, update, [WEIGHT, GRADIENT, *known])
        states = dict(exact)
        if fitted is None and rest:
            # Whatever moves these, the weight is a combination of them and of what is known.
            befores = [state_name(key) for key in rest if key in step.states_before]
            afters = [after_step(state_name(key)) for key in rest]
            fitted = self._exactly(step, update, [WEIGHT, GRADIENT, *known, *befores, *afters])
            if fitted is not None:
                self.averages, self._regressed = True, rest
                states |= {key: self._regression_of_state(step, key) for key in rest}
        self.followed = list(states)
        self._lost += [key for key in rest if key not in states]
        tries_across, self._was_exact = self._tries_across, fitted is not None and moves
        self._found_exact = fitted is not None
        if fitted is None:
            self.averages = True
            update = without_directions(update, step.directions)
            weight, fit = self._regression(step, update, known, tries_across=tries_across)
            return Response(False, fit.share, fit.is_across_units, weight, states)
        weight, fit = fitted
        return Response(True, fit.share, fit.is_across_units, weight, states)

    def _require_same_states(self, step: OptimizerStep) -> None:
        gone = [key for key in self.followed if key not in step.states_after]
        if gone:
            raise RuntimeError(
                f"dd.decouple: {gone[0]!r}, whose shadow was followed, has vanished from the "
                "optimizer's state of the decoupled weight; keep that state, or call detach() and "
                "decouple anew, from untrained weights"
            )

    def _exact_states(self, step: OptimizerStep) -> dict[str, Combination]:
        """What a step adds to tensors of the state that are combinations, by their keys."""
        found = {}
        for key in step.states_after:
            if key in self._regressed or (key in step.states_before and key not in self.followed):
                continue
            names, change = [WEIGHT, GRADIENT], step.states_after[key]
            if key in step.states_before:
                names, change = [state_name(key), *names], change - step.states_before[key]
            fitted = self._exactly(step, change, names)
            if fitted is not None:
                found[key] = fitted[0]
        return found

    def _exactly(
        self, step: OptimizerStep, change: Tensor, names: list[str]
    ) -> tuple[Combination, ResponseFit] | None:
        """A change as a combination up to rounding, or None."""
        basis = [step.quantity(name) for name in names]
        fit = fit_by_unit(change, basis, _EXACT_RIDGE)
        if fit is None:
            fit = fit_of_all_units(change, basis, _EXACT_RIDGE)
        is_exact = fit is not None and _is_exact(fit, change, step.before)
        if not is_exact and self._tries_across:
            fit = fit_across_units(change, basis, _EXACT_RIDGE)
            is_exact = fit is not None and _is_exact(fit, change, step.before)
            self._across |= is_exact
        return (Combination(names, fit.coefficients), fit) if fit and is_exact else None

    @property
    def _tries_across(self) -> bool:
        is_due = self._steps <= _FIRST_STEPS or self._steps % _EVERY == 0
        # Where units were followed by themselves and that has ended, the optimizer has changed.
        return self._across or self._was_exact or is_due

    def _regression(
        self, step: OptimizerStep, update: Tensor, known: list[str], *, tries_across: bool
    ) -> tuple[Combination, ResponseFit]:
        """An update's mean derivative, from its regression on the noise of the gradients.

        Raises:
            ValueError: if the layer has too few inputs to tell.
        """
        averages = [average_name(position) for position in range(len(step.averages))]
        names = [WEIGHT, GRADIENT, *averages, *known]
        found = {name: without_directions(step.quantity(name), step.directions) for name in names}
        _require_inputs(update, names)
        averaged = [found[name] for name in [GRADIENT, *averages]]
        added = [name for name in known if not _is_redundant(found[name], averaged)]
        names = [WEIGHT, GRADIENT, *averages, *added]
        best, fit = names, _simpler(update, [found[name] for name in names])
        if tries_across:
            few = [WEIGHT, GRADIENT, *(known or averages)]
            basis = [found[name] for name in few]
            across = fit_across_units(update, basis, _ridge(update, len(basis)))
            gains = across is not None and across.unexplained < _ACROSS_GAIN * fit.unexplained
            if across is not None and gains:
                best, fit = few, across
            self._across = gains
        return Combination(best, fit.coefficients), fit

    def _regression_of_state(self, step: OptimizerStep, key: str) -> Combination:
        """Likewise, of what a step adds to a tensor of the state."""
        change = step.states_after[key]
        if key in step.states_before:
            change = change - step.states_before[key]
        change = without_directions(change, step.directions)
        return self._regression(step, change, [], tries_across=False)[0]


def _is_exact(fit: ResponseFit, change: Tensor, weight: Tensor) -> bool:
    """Whether a fit leaves no more than rounding.

    What merely shrinks or copies the weight is no evidence, and explains next to all of a change
    that is mostly that.
    """
    change, weight = change.double(), weight.double()
    along = (change * weight).sum(1, keepdim=True)
    size = weight.square().sum(1, keepdim=True)
    beside = change - along / size.clamp_min(torch.finfo(torch.float64).tiny) * weight
    rounding = 4 * torch.finfo(torch.float32).eps
    allowed = _EXACT * float(beside.square().sum()) + rounding**2 * float(size.sum())
    return fit.freedom >= _EVIDENCE and fit.unexplained <= allowed


def _simpler(update: Tensor, basis: list[Tensor]) -> ResponseFit:
    """A fit by unit, or of all units alike where inputs are too few to tell units apart."""
    ridge = _ridge(update, len(basis))
    by_unit = fit_by_unit(update, basis, ridge)
    alike = fit_of_all_units(update, basis, ridge)
    # There are enough weights for one coefficient a quantity.
    assert alike is not None
    if by_unit is None or alike.unexplained < by_unit.unexplained:
        return alike
    return by_unit


def _ridge(update: Tensor, count: int) -> float:
    """Penalty on quantities of unit length.

    Gradients of successive steps are nearly alike, and d coordinates tell their small differences
    apart to p/d of the update's size, which their shadows would take for a response (Hoerl,
    Kennard and Baldwin 1975, with as much left over as explained).
    """
    return count / update.shape[1]


def _is_redundant(quantity: Tensor, averages: list[Tensor]) -> bool:
    fit = fit_by_unit(quantity, averages, _EXACT_RIDGE)
    return fit is not None and fit.share > _REDUNDANT


def _require_inputs(update: Tensor, names: list[str]) -> None:
    if update.numel() < _NUMBERS_PER_COLUMN * len(names):
        raise ValueError(
            f"dd.decouple: a decoupled layer of {update.shape[1]} inputs and {update.shape[0]} "
            f"units has too few weights to find {len(names)} coefficients of the optimizer's "
            "response from; train it with dd.DecoupledDescent, whose response is known"
        )
