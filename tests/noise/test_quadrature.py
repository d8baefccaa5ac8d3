"""A few eigenvalues in place of a spectrum: exact where the rule says so, close elsewhere."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dd.noise.quadrature import TOLERANCE, _poles, _rational_gauss, nodes

D = 300


def spectrum(name: str) -> Tensor:
    ranks = torch.arange(1, D + 1, dtype=torch.float64)
    return {
        "flat": torch.full((D,), 2.5, dtype=torch.float64),
        "two levels": torch.where(ranks <= 90, 4.0, 0.2).double(),
        "spikes": torch.where(ranks <= 6, 30.0 / ranks, 1.0).double(),
        "1/rank": 10 / ranks,
        "1/rank²": 10 / ranks.square(),
        "a third without noise": torch.where(ranks <= 200, 5 / ranks.sqrt(), 0.0).double(),
    }[name]


NAMES = ("flat", "two levels", "spikes", "1/rank", "1/rank²", "a third without noise")


def decayed(values: Tensor, counts: Tensor | float, times: Tensor) -> Tensor:
    """Traces tr Σ exp(−tΣ), shape (len(times),)."""
    return (counts * values * torch.exp(-times[:, None] * values)).sum(1)


@given(st.lists(st.floats(0.01, 100), min_size=12, max_size=40), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_rule_is_exact_for_the_functions_that_it_names(values, count):
    """Sums of d terms of these functions carry d roundings, and the rule's own some hundreds."""
    values = np.array(values) / np.mean(values)
    poles = _poles(values, count)
    found, weights = _rational_gauss(values, poles)
    functions = [np.ones_like, lambda x: x]
    functions += [lambda x, c=c, p=p: (x + c) ** -p for c in set(poles) for p in (1, 2)]
    for function in functions:
        np.testing.assert_allclose((weights * function(found)).sum(), function(values).sum(), 1e-8)
    assert (weights > 0).all()
    assert found.max() <= values.max()
    assert found.min() >= values.min()


@pytest.mark.parametrize("most", [1, 2, 3, 12])
@pytest.mark.parametrize("name", NAMES)
def test_dimension_and_trace_are_kept(name, most):
    values, counts = nodes(spectrum(name), most)
    assert len(values) <= most
    assert float(counts.sum()) == pytest.approx(D, rel=1e-10)
    assert float((counts * values).sum()) == pytest.approx(float(spectrum(name).sum()), rel=1e-10)
    assert bool((values.diff() < 0).all())
    if most == 1:
        assert float(values) == pytest.approx(float(spectrum(name).mean()))


def test_a_spectrum_of_few_eigenvalues_is_its_own_quadrature():
    values, counts = nodes(spectrum("two levels"), 12)
    torch.testing.assert_close(values, torch.tensor([4.0, 0.2]).double())
    torch.testing.assert_close(counts, torch.tensor([90.0, 210.0]).double())
    assert len(nodes(spectrum("flat"), 12)[0]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_decays_are_those_of_the_spectrum(name):
    """On a grid of times of its own; the mean over another grid differs by less than a tenth."""
    truth = spectrum(name)
    times = torch.logspace(-2, 1, 301, dtype=torch.float64) / truth.mean()
    whole = decayed(truth, 1.0, times)
    counted = whole > 0.01 * truth.sum()
    error = (decayed(*nodes(truth, 12), times) / whole - 1).abs()[counted]
    assert float(error.mean()) < 1.1 * TOLERANCE


@pytest.mark.parametrize("name", NAMES[2:])
def test_steps_of_any_length_decay_as_under_the_spectrum(name):
    """Products of 1 − η λ h, as far as none of them turns a shadow round.

    Where η λ h is of order one they are no mixture of exponentials, for which the nodes are chosen:
    in the largest eigenvalues alone. Twice the tolerance makes room for that.
    """
    truth = spectrum(name)
    values, counts = nodes(truth, 12)
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(200, generator=generator).double() / truth.max()
    exact, found = torch.ones(D).double(), torch.ones(len(values)).double()
    for rate in rates:
        off = float((counts * values * found).sum() - (truth * exact).sum())
        assert abs(off) < 2 * TOLERANCE * float(truth.sum())
        exact, found = exact * (1 - rate * truth), found * (1 - rate * values)


def test_fewer_nodes_than_bins_of_equal_log_rank_do_as_well():
    truth = spectrum("1/rank")
    edges = [0, *np.unique(np.logspace(0, math.log10(D), 12).round().astype(int))]
    parts = truth.split(np.diff(edges).tolist())
    bins = torch.stack([p.mean() for p in parts]), torch.tensor([float(len(p)) for p in parts])
    times = torch.logspace(-2, 1, 30, dtype=torch.float64) / truth.mean()
    whole = decayed(truth, 1.0, times)
    errors = [
        float((decayed(*few, times) / whole - 1).abs().mean()) for few in (nodes(truth, 6), bins)
    ]
    assert errors[0] < errors[1]
