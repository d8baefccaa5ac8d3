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
    UnitProducts,
    coefficients_by_bin,
    fit_across_units,
    fit_by_unit,
    fit_of_all_units,
)
from dd.rules.quantities import (
    AVERAGE_RATES,
    GRADIENT,
    UPDATE,
    WEIGHT,
    Combination,
    OptimizerStep,
    after_step,
    average_name,
    change_name,
    changes,
    state_name,
)

__all__ = ["Response", "ResponseIdentifier"]

# What rounding in single precision leaves unexplained of an update that is a combination, and
# bfloat16 within Muon's iterations, is less; what coordinate-wise optimizers leave is far more.
_EXACT = 1e-4
_EXACT_RIDGE = 1e-9
# As many degrees of freedom leave next to nothing by chance once in 1e8 steps.
_EVIDENCE = 4
# A quantity of which the averages explain this share brings nothing but noise to a regression.
_REDUNDANT = 0.99
# Averages that were given up begin anew, and late, where known quantities explain less than this.
_STILL_COMPLETE = 0.9
# A combination across units must leave this share of what one by unit leaves.
_ACROSS_GAIN = 0.5
# A tensor of the state stands for an average that it is a multiple of, up to rounding; that is
# known once gradients have differed.
_SAME, _DIFFERED = 1e-10, 3
# After these steps a form that was ruled out is tried now and then.
_FIRST_STEPS, _EVERY = 8, 16
_NUMBERS_PER_COLUMN = 10


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

    @property
    def is_by_unit(self) -> bool:
        """Whether every unit of all that is followed answers to itself alone."""
        found = [self.weight, *self.states.values()]
        return all(change.coefficients.dim() == 2 for change in found)


class ResponseIdentifier:
    """Finds the response of one optimizer, step by step.

    Attributes:
        followed: keys of the tensors of the optimizer's state whose shadows are known.
        averages: positions in :data:`AVERAGE_RATES` of the averages of the gradients that are kept,
            and their shadows.
    """

    def __init__(self) -> None:
        self.followed: list[str] = []
        self._averages = False
        self._regressed: list[str] = []
        self._lost: list[str] = []
        self._added: list[str] = []
        # Tensors of the state that are multiples of an average, which is then not kept beside them.
        self._stand_ins: dict[int, str] = {}
        self._across = self._is_told_apart = self._is_complete = False
        self._steps = 0
        self._was_exact = self._found_exact = False

    @property
    def averages(self) -> tuple[int, ...]:
        """Positions of the averages that are kept."""
        return self.missing_averages if self._averages else ()

    @property
    def missing_averages(self) -> tuple[int, ...]:
        """Positions of the averages that no tensor of the state stands for."""
        return tuple(i for i in range(len(AVERAGE_RATES)) if i not in self._stand_ins)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far, in plain values."""
        found: dict[str, Any] = {"followed": self.followed, "regressed": self._regressed}
        found |= {"lost": self._lost, "added": self._added}
        found = {key: list(names) for key, names in found.items()}
        return found | {
            "averages": self._averages,
            "stand_ins": dict(self._stand_ins),
            "across": self._across,
            "told_apart": self._is_told_apart,
            "complete": self._is_complete,
            "steps": self._steps,
            "exact": self._was_exact,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.followed, self._lost = list(state["followed"]), list(state["lost"])
        self._regressed, self._added = list(state["regressed"]), list(state.get("added", []))
        self._averages, self._across = state["averages"], state["across"]
        # States of older versions keep every average, and are looked at anew.
        self._stand_ins = dict(state.get("stand_ins", {}))
        self._is_told_apart = state.get("told_apart", False)
        self._is_complete = state.get("complete", False)
        self._steps, self._was_exact = state["steps"], state["exact"]

    @property
    def regresses(self) -> bool:
        """Whether a part of the last step's response was found by regression."""
        return bool(self._regressed) or not self._found_exact

    def forget(self, key: str) -> None:
        """Follow a tensor of the optimizer's state no more, until it is made anew."""
        self.followed = [other for other in self.followed if other != key]
        self._regressed = [other for other in self._regressed if other != key]
        self._stand_ins = {at: k for at, k in self._stand_ins.items() if k != key}

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
        products = step.products(averages=self._averages, afters=[*self._stand_ins.values()])
        states = self._exact_states(step, products)
        rest = [key for key in step.states_after if key not in states]
        known = [state_name(key) for key in states if key in step.states_before]
        fitted = None
        if self._tries_exact:
            fitted = self._exactly(products, UPDATE, [WEIGHT, GRADIENT, *known])
        if fitted is None and rest:
            # Whatever moves these, the weight is a combination of them and of what is known.
            befores = [state_name(key) for key in rest if key in step.states_before]
            afters = step.named_afters(rest)
            products = products.joined(afters)
            names = [WEIGHT, GRADIENT, *known, *befores, *afters]
            fitted = self._exactly(products, UPDATE, names)
            if fitted is not None:
                noise = self._noise(step, products)
                self._regressed = rest
                states |= {key: self._regression_of_state(noise, key, step) for key in rest}
        self._follow(list(states), [key for key in rest if key not in states])
        tries_across, self._was_exact = self._tries_across, fitted is not None and moves
        self._found_exact = fitted is not None
        if fitted is None:
            products = products.joined(step.named_afters(self._find_stand_ins(step)))
            noise = self._noise(step, products, is_complete=self._is_complete)
            tries_across |= step.pools_units
            weight, fit = self._regression(noise, UPDATE, known, step, tries_across=tries_across)
            self._see_if_complete(fit, known)
            return Response(False, fit.share, fit.is_across_units, weight, states)
        weight, fit = fitted
        return Response(True, fit.share, fit.is_across_units, weight, states)

    def _follow(self, keys: list[str], lost: list[str]) -> None:
        self.followed = keys
        self._lost += lost
        self._stand_ins = {at: key for at, key in self._stand_ins.items() if key in keys}

    def _require_same_states(self, step: OptimizerStep) -> None:
        gone = [key for key in self.followed if key not in step.states_after]
        if gone:
            raise RuntimeError(
                f"dd.decouple: {gone[0]!r}, whose shadow was followed, has vanished from the "
                "optimizer's state of the decoupled weight; keep that state, or call detach() and "
                "decouple anew, from untrained weights"
            )

    def _exact_states(self, step: OptimizerStep, products: UnitProducts) -> dict[str, Combination]:
        """What a step adds to tensors of the state that are combinations, by their keys."""
        found = {}
        for key in step.states_after:
            if key in self._regressed or (key in step.states_before and key not in self.followed):
                continue
            names = [WEIGHT, GRADIENT]
            if key in step.states_before:
                names = [state_name(key), *names]
            fitted = self._exactly(products, change_name(key), names)
            if fitted is not None:
                found[key] = fitted[0]
        return found

    def _exactly(
        self, products: UnitProducts, change: str, names: list[str]
    ) -> tuple[Combination, ResponseFit] | None:
        """A change as a combination up to rounding, or None."""
        fit = fit_by_unit(products, change, names, _EXACT_RIDGE)
        if fit is None:
            fit = fit_of_all_units(products, change, names, _EXACT_RIDGE)
        is_exact = fit is not None and _is_exact(fit, products, change, names)
        if not is_exact and self._tries_across:
            fit = fit_across_units(products, change, names, _EXACT_RIDGE)
            is_exact = fit is not None and _is_exact(fit, products, change, names)
            self._across |= is_exact
        return (Combination(names, fit.coefficients), fit) if fit and is_exact else None

    @property
    def _is_due(self) -> bool:
        return self._steps <= _FIRST_STEPS or self._steps % _EVERY == 0

    @property
    def _tries_exact(self) -> bool:
        return self._was_exact or self._is_due

    @property
    def _tries_across(self) -> bool:
        # Where units were followed by themselves and that has ended, the optimizer has changed.
        return self._across or self._was_exact or self._is_due

    def _noise(
        self, step: OptimizerStep, products: UnitProducts, *, is_complete: bool = False
    ) -> UnitProducts:
        """Products of the noise alone, with averages, kept from now on, where it lacks them."""
        if not self._averages and not is_complete:
            self._averages = True
            products = products.joined(step.named_averages())
        return products.without(step.directions)

    def _see_if_complete(self, fit: ResponseFit, known: Sequence[str]) -> None:
        """Whether units that answer to each other's momenta leave averages nothing to explain."""
        least = _STILL_COMPLETE if self._is_complete else _REDUNDANT
        self._is_complete = bool(known) and fit.is_across_units and fit.share > least
        self._averages &= not self._is_complete

    def _find_stand_ins(self, step: OptimizerStep) -> list[str]:
        """Find tensors of the state that stand for averages; return those not known before."""
        if not (self._is_due and self._steps >= _DIFFERED):
            return []
        known = list(self._stand_ins.values())
        for position, average in step.averages.items():
            found = [k for k in self.followed if _is_multiple(step.states_after[k], average)]
            if found:
                self._stand_ins[position] = found[0]
        return [key for key in self._stand_ins.values() if key not in known]

    def _regression(
        self,
        noise: UnitProducts,
        change: str,
        known: list[str],
        step: OptimizerStep,
        *,
        tries_across: bool,
    ) -> tuple[Combination, ResponseFit]:
        """An update's mean derivative, from its regression on the noise of the gradients.

        Raises:
            ValueError: if the layer has too few inputs to tell.
        """
        # As a step leaves them, as averages are: what it finds is nearly along the gradient.
        stand_ins = [after_step(state_name(key)) for key in self._stand_ins.values()]
        averages = [*(average_name(position) for position in self.averages), *stand_ins]
        _require_inputs(noise, 2 + len(averages) + len(known))
        names = [WEIGHT, GRADIENT, *averages, *self._worth_adding(noise, averages, known)]
        best, fit = names, self._simpler(noise, change, names)
        if tries_across:
            few = [WEIGHT, GRADIENT, *(known or averages)]
            across = fit_across_units(noise, change, few, _ridge(noise, len(few)))
            gains = across is not None and across.unexplained < _ACROSS_GAIN * fit.unexplained
            if step.pools_units:
                # A factor of an input answers to the gradients of all units, each by little.
                gains = across is not None and _tells_units_apart(noise, len(few))
            if across is not None and gains:
                best, fit = few, across
            self._across = gains
        by_bin = None
        bins = step.bins
        if bins is not None and not fit.is_across_units and self._is_told_apart:
            by_bin = coefficients_by_bin(noise, change, best, fit, bins)
        return Combination(best, fit.coefficients, by_bin), fit

    def _simpler(self, noise: UnitProducts, change: str, names: Sequence[str]) -> ResponseFit:
        """A fit by unit, or of all units alike where inputs are too few to tell units apart."""
        ridge = _ridge(noise, len(names))
        by_unit = fit_by_unit(noise, change, names, ridge)
        if by_unit is not None and self._is_told_apart and not self._is_due:
            return by_unit
        alike = fit_of_all_units(noise, change, names, ridge)
        # There are enough weights for one coefficient a quantity.
        assert alike is not None
        self._is_told_apart = by_unit is not None and by_unit.unexplained <= alike.unexplained
        return by_unit if by_unit is not None and self._is_told_apart else alike

    def _worth_adding(
        self, noise: UnitProducts, averages: list[str], known: list[str]
    ) -> list[str]:
        """Tensors of the state that averages do not explain."""
        if self._is_due:
            basis = [GRADIENT, *averages]
            self._added = [name for name in known if not _is_redundant(noise, name, basis)]
        return [name for name in self._added if name in known]

    def _regression_of_state(
        self, noise: UnitProducts, key: str, step: OptimizerStep
    ) -> Combination:
        """Likewise, of what a step adds to a tensor of the state."""
        return self._regression(noise, change_name(key), [], step, tries_across=False)[0]


def _is_exact(fit: ResponseFit, products: UnitProducts, change: str, names: Sequence[str]) -> bool:
    """Whether a fit leaves no more than rounding, of the change and of what is changed.

    What merely shrinks or copies the weight is no evidence, and explains next to all of a change
    that is mostly that.
    """
    if fit.freedom < _EVIDENCE:
        return False
    along, size = products.of(change, WEIGHT), products.of(WEIGHT, WEIGHT)
    beside = products.of(change, change) - along.square() / size.clamp_min(
        torch.finfo(size.dtype).tiny
    )
    (changed,) = [name for name in names if changes(change, name)] or [change]
    rounded = products.of(changed, changed)
    sizes = torch.stack([beside.clamp_min(0.0).sum(), rounded.sum()]).tolist()
    allowed = _EXACT * sizes[0] + (4 * torch.finfo(torch.float32).eps) ** 2 * sizes[1]
    if abs(fit.unexplained - allowed) > fit.rounding:
        return fit.unexplained <= allowed
    return products.left(change, names, fit.coefficients) <= allowed


def _ridge(noise: UnitProducts, count: int) -> float:
    """Penalty on quantities of unit length.

    Gradients of successive steps are nearly alike, and d coordinates tell their small differences
    apart to p/d of the update's size, which their shadows would take for a response (Hoerl,
    Kennard and Baldwin 1975, with as much left over as explained).
    """
    return count / noise.shape[1]


def _tells_units_apart(noise: UnitProducts, count: int) -> bool:
    width, dimension = noise.shape
    return _NUMBERS_PER_COLUMN * count * width <= dimension


def _is_redundant(noise: UnitProducts, quantity: str, averages: Sequence[str]) -> bool:
    fit = fit_by_unit(noise, quantity, averages, _EXACT_RIDGE)
    return fit is not None and fit.share > _REDUNDANT


def _is_multiple(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    size, other_size, product = (one * one).sum(), (other * other).sum(), (one * other).sum()
    return bool((size * other_size > 0) & (size - product**2 / other_size <= _SAME * size))


def _require_inputs(noise: UnitProducts, count: int) -> None:
    width, dimension = noise.shape
    if width * dimension < _NUMBERS_PER_COLUMN * count:
        raise ValueError(
            f"dd.decouple: a decoupled layer of {dimension} inputs and {width} units has too few "
            f"weights to find {count} coefficients of the optimizer's response from; train it with "
            "dd.DecoupledDescent, whose response is known"
        )
