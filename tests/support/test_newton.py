"""Minimisation over a few numbers: exact where that is possible, and safe everywhere."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dd.support.newton import minimise

NONE = -math.inf


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


class Seen:
    """A function that takes down where it was called."""

    def __init__(self, function):
        self.function, self.points, self.values = function, [], []

    def __call__(self, point):
        value, derivative = self.function(point)
        self.points.append(point.clone())
        self.values.append(value)
        return value, derivative


def quadratic(hessian, slope):
    return lambda x: (float(x @ hessian @ x / 2 + slope @ x), hessian @ x + slope)


def differentiated(function):
    def both(point):
        x = point.clone().requires_grad_()
        value = function(x)
        (derivative,) = torch.autograd.grad(value, x)
        return float(value.detach()), derivative

    return both


def lowest_above(hessian, slope, floors):
    """Minimum of a convex quadratic above floors: the lowest of all choices of active ones."""
    found = []
    for active in product(*([False] if floor == NONE else [False, True] for floor in floors)):
        held = torch.tensor(active)
        x = torch.where(held, floors, 0.0)
        if not held.all():
            slope_there = (slope + hessian @ x)[~held]
            x[~held] = -torch.linalg.inv(hessian[~held][:, ~held]) @ slope_there
        if (x >= floors).all():
            found.append((quadratic(hessian, slope)(x)[0], x))
    return min(found, key=lambda one: one[0])


HESSIAN = torch.tensor([[2.0, 0.9, 0.0], [0.9, 1.0, -0.5], [0.0, -0.5, 3.0]]).double()


@pytest.mark.parametrize(
    "floors",
    [(NONE, NONE, NONE), (NONE, 0.0, NONE), (0.0, NONE, 0.0), (0.0, 0.0, 0.0)],
    ids=str,
)
def test_quadratics_within_reach_take_one_step_of_newton(floors):
    slope = numbers(0.15, -0.35, 0.2)
    seen = Seen(quadratic(HESSIAN, slope))
    value, point = minimise(seen, numbers(0.4, 0.2, 0.1), numbers(*floors), evaluations=14)
    expected, where = lowest_above(HESSIAN, slope, numbers(*floors))
    assert len(seen.points) == 5
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(point, where, rtol=0, atol=1e-10)


def test_minima_far_away_are_reached_by_longer_and_longer_steps():
    seen = Seen(quadratic(torch.eye(2).double(), numbers(-20.0, 5.0)))
    _, point = minimise(seen, numbers(0.0, 0.0), numbers(NONE, NONE), evaluations=14)
    torch.testing.assert_close(point, numbers(20.0, -5.0), rtol=0, atol=1e-9)
    lengths = [
        float((after - before).abs().max())
        for before, after in zip([seen.points[0], *seen.points[3:]], seen.points[3:], strict=False)
    ]
    assert lengths[:4] == pytest.approx([1.0, 2.0, 4.0, 4.0])


finite = st.floats(-2, 2).map(lambda x: round(x, 3))


@st.composite
def bounded_quadratics(draw):
    width = draw(st.integers(1, 3))
    root = torch.tensor(draw(st.lists(finite, min_size=width**2, max_size=width**2))).double()
    root = root.view(width, width)
    hessian = root @ root.T + 0.1 * torch.eye(width).double()
    floors = numbers(*(draw(st.sampled_from([NONE, 0.0, -0.5])) for _ in range(width)))
    above = numbers(*(abs(draw(finite)) for _ in range(width)))
    start = torch.where(floors.isfinite(), floors, 0.0) + above
    return hessian, numbers(*(draw(finite) for _ in range(width))), floors, start


@settings(deadline=None, max_examples=150)
@given(bounded_quadratics())
def test_convex_quadratics_above_floors_are_solved(problem):
    """Down to what is too small a gain to be taken, which is a millionth of the value or 1e-9."""
    hessian, slope, floors, start = problem
    seen = Seen(quadratic(hessian, slope))
    value, point = minimise(seen, start, floors, evaluations=60)
    expected, _ = lowest_above(hessian, slope, floors)
    assert all(bool((x >= floors).all()) for x in seen.points)
    assert value == seen.function(point)[0]
    assert value - expected <= 1e-9 + 2e-6 * abs(value)


def test_a_saddle_is_left():
    function = differentiated(lambda x: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
    free = numbers(NONE, NONE)
    value, point = minimise(function, numbers(0.5, 0.01), free, evaluations=20)
    assert value == pytest.approx(-0.25, abs=1e-5)
    assert point.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-2)
    # At the very saddle the derivative tells nothing, but what was seen around it does.
    assert minimise(function, numbers(0.0, 0.0), free, evaluations=20)[0] < 0


def test_a_maximum_is_left():
    function = differentiated(lambda x: torch.cos(x).sum())
    value, _ = minimise(function, numbers(0.1, -0.2), numbers(NONE, NONE), evaluations=20)
    assert value == pytest.approx(-2.0, abs=1e-5)


@pytest.mark.parametrize("beyond", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("wall", [0.01, 0.6])
@pytest.mark.parametrize("known", [True, False], ids=["", "no derivative"])
def test_walls_are_kept_away_from(beyond, wall, known):
    """The minimum lies behind a wall, which is at the start or on the way."""

    def function(x):
        value, derivative = quadratic(torch.eye(2).double(), numbers(-1.0, 1.0))(x)
        if x[0] <= wall:
            return value, derivative
        if known:
            return beyond, torch.zeros(2).double()
        return 0.0, derivative * beyond

    value, point = minimise(function, numbers(0.0, 0.0), numbers(NONE, NONE), evaluations=40)
    assert point[0] <= wall
    assert value == function(point)[0]
    assert value < -0.25


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_a_start_in_a_wall_is_given_up(value):
    seen = Seen(lambda x: (value, torch.full_like(x, math.nan)))
    found, point = minimise(seen, numbers(0.3, 0.4), numbers(NONE, 0.0), evaluations=14)
    assert found == math.inf
    assert torch.equal(point, numbers(0.3, 0.4))
    assert len(seen.points) == 1


def test_a_start_below_the_floors_is_raised():
    seen = Seen(quadratic(torch.eye(2).double(), numbers(1.0, -1.0)))
    _, point = minimise(seen, numbers(-3.0, -3.0), numbers(0.0, -1.0), evaluations=14)
    assert torch.equal(seen.points[0], numbers(0.0, -1.0))
    torch.testing.assert_close(point, numbers(0.0, 1.0))


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e160, 1e306])
def test_functions_of_any_size(scale):
    def function(x):
        value, derivative = quadratic(torch.eye(2).double(), numbers(-1.0, 1.0))(x)
        return scale * value, scale * derivative

    value, point = minimise(function, numbers(3.0, 0.0), numbers(NONE, NONE), evaluations=30)
    assert point.isfinite().all()
    assert value <= function(numbers(3.0, 0.0))[0]
    if 1e-9 < scale < 1e150:
        torch.testing.assert_close(point, numbers(1.0, -1.0))


@pytest.mark.parametrize("derivative", [0.0, 1.0])
def test_flat_and_straight_functions(derivative):
    def function(x):
        return float(derivative * x.sum()), torch.full_like(x, derivative)

    value, point = minimise(function, numbers(2.0, 2.0), numbers(NONE, NONE), evaluations=14)
    assert point.isfinite().all()
    # Steps of 1, 2 and then 4 along both.
    assert value == pytest.approx(derivative * (4.0 - 2 * (1 + 2 + 9 * 4)))


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_evaluations_are_bounded(width, spare):
    """On a bumpy slope without an end."""
    seen = Seen(differentiated(lambda x: (0.3 * torch.sin(3 * x) - x).sum()))
    start = torch.zeros(width).double()
    minimise(seen, start, torch.full((width,), NONE), evaluations=width + 1 + spare)
    assert len(seen.points) == width + 1 + spare


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    spare=st.integers(0, 12),
    bad=st.sampled_from([0.0, 0.3, 1.0]),
    poison=st.sampled_from([math.inf, -math.inf, math.nan]),
)
def test_what_is_returned_is_the_lowest_that_was_seen(width, seed, spare, bad, poison):
    """On waves full of walls, most of them without a derivative."""
    g = torch.Generator().manual_seed(seed)
    waves = 3 * torch.randn(4, width, generator=g, dtype=torch.float64)
    start = torch.randn(width, generator=g, dtype=torch.float64)
    floors = torch.where(torch.rand(width, generator=g) < 0.5, start - 0.5, NONE)
    smooth = differentiated(lambda x: (waves @ x).sin().sum())
    calls = []

    def function(x):
        value, derivative = smooth(x)
        if calls and torch.rand((), generator=g) < bad:
            value = poison if torch.rand((), generator=g) < 0.5 else value
            derivative = derivative * poison
        calls.append(math.inf if not derivative.isfinite().all() else value)
        return value, derivative

    seen = Seen(function)
    value, point = minimise(seen, start, floors, evaluations=width + 1 + spare)
    assert len(seen.points) <= width + 1 + spare
    assert all(bool((x >= floors).all()) for x in seen.points)
    assert math.isfinite(value)
    assert value == min(calls)
    assert torch.equal(point, seen.points[calls.index(value)])


@settings(deadline=None, max_examples=300)
@given(width=st.integers(1, 3), seed=st.integers(0, 2**32), magnitude=st.sampled_from([150, 308]))
def test_derivatives_that_overflow_do_no_harm(width, seed, magnitude):
    g = torch.Generator().manual_seed(seed)
    start = 10 ** (6 * torch.rand(width, generator=g, dtype=torch.float64))

    def function(x):
        exponents = magnitude * torch.rand(width, generator=g, dtype=torch.float64)
        signs = 2.0 * torch.randint(2, (width,), generator=g) - 1
        return float(torch.rand((), generator=g)), signs * 10**exponents

    seen = Seen(function)
    value, _ = minimise(seen, start, torch.zeros(width).double(), evaluations=14)
    assert value == min(seen.values)
    assert all(bool((x.isfinite() & (x >= 0)).all()) for x in seen.points)
