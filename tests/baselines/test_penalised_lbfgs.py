"""L-BFGS with weight decay."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dd.baselines.penalised_lbfgs import LBFGS
from dd.data import Split
from dd.experiments.assembly import make_optimizer
from tests.composed import composed


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(40, generator=generator, dtype=torch.float64)


def squares(inputs, targets, weight, penalty=0.0):
    loss = 0.5 * (inputs @ weight - targets).square().mean()
    return loss + 0.5 * penalty * weight.square().sum()


def minimised(kind, loss, weight, steps, **options):
    optimizer = kind([weight], line_search_fn="strong_wolfe", **options)
    values = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        values.append(float(optimizer.step(closure).detach()))
    return values


def test_minimum_is_that_of_ridge_regression(problem):
    inputs, targets = problem
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    # To the end, not to where the loss changes by a billionth.
    exactly = {"tolerance_change": 0.0, "tolerance_grad": 1e-12}
    minimised(
        LBFGS, lambda: squares(inputs, targets, weight), weight, 5, weight_decay=0.3, **exactly
    )
    gram = inputs.T @ inputs / 40 + 0.3 * torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(gram, inputs.T @ targets / 40)
    torch.testing.assert_close(weight.detach(), exact, rtol=1e-6, atol=1e-8)


def test_every_step_is_that_of_torch_on_the_penalised_loss(problem):
    inputs, targets = problem
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    ours, torchs = (start.clone().requires_grad_() for _ in range(2))
    own = minimised(
        LBFGS, lambda: squares(inputs, targets, ours), ours, 4, weight_decay=0.1, max_iter=1
    )
    theirs = minimised(
        torch.optim.LBFGS, lambda: squares(inputs, targets, torchs, 0.1), torchs, 4, max_iter=1
    )
    assert own == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


def test_weight_decay_must_be_a_number_not_negative():
    with pytest.raises(ValueError, match="weight_decay"):
        LBFGS([torch.zeros(2, requires_grad=True)], weight_decay=-0.1)


def test_line_search_of_the_configured_optimizer_goes_on_after_a_step_too_long():
    # Where curvature rises along the way, the first trial of a step is too long.
    weight = torch.tensor([3.0, 2.0], requires_grad=True)
    holder = torch.nn.ParameterList([weight])
    config = composed("experiment=xor")
    empty = torch.zeros(1, 2)
    split = Split(empty, torch.zeros(1).long(), None, empty, torch.zeros(1).long())
    optimizer = make_optimizer(config, "lbfgs", holder, split)
    scales = torch.tensor([1.0, 30.0])

    def closure():
        optimizer.zero_grad()
        loss = (scales * holder[0].square()).square().sum() + F.softplus(-8 * holder[0]).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(25)]
    assert all(after < before for before, after in pairwise(losses[:7]))
    assert losses[-1] < 1e-3 * losses[0]
