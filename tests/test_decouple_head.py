"""``dd.decouple(..., head=True)``: what all samples share, by the optimizers' own rules."""

import pytest
import torch
from torch import nn

import dd
from tests.test_decouple import (
    Averaging,
    full,
    load_all,
    mini,
    network,
    problem,
    refused,
    rest_of,
    states_from_file,
    train,
)

RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def displacements(states, model):
    weight, *rest = model[0].weight, model[0].bias, model[2].weight, model[2].bias
    return [states[weight]["signal_shadow"], *(states[p]["shadow"] for p in rest)]


@pytest.mark.parametrize("batches", [full, mini])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("order", ["one", "first", "last"])
def test_displacements_under_sgd_are_those_of_the_closed_rule(batches, rule, order):
    (X, y, components), _ = problem()
    noise, found = dd.NoiseModel.fit(X, components), []
    for identified in (True, False):
        model = network()
        if identified:
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, **rule)]
            if order != "one":
                parts = [[model[0].weight], rest_of(model)]
                optimizers = [torch.optim.SGD(part, lr=0.1, **rule) for part in parts]
            tracker = dd.decouple(model, *optimizers, noise=noise, head=True)
            if order == "last":
                optimizers.reverse()
            states = tracker._state
        else:
            tracker = dd.DecoupledDescent(
                model, lr=0.1, **rule, noise=noise, head=True, curvature="stein"
            )
            optimizers, states = [tracker], tracker.state
        train(model, optimizers, batches(X, y, 12))
        found.append([tracker.shadow, *displacements(states, model)])
    for one, other in zip(*found, strict=True):
        # A step's change is known to rounding of the weights that it is taken between.
        assert torch.linalg.vector_norm(one - other) < 1e-4 * torch.linalg.vector_norm(other)


def build(kind="together"):
    """Of optimizers: one of all, Muon or SGD for the decoupled weight beside AdamW."""
    (X, y, components), _ = problem()
    model = network()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01)]
    if kind != "together":
        rule = torch.optim.Muon if kind == "muon" else torch.optim.SGD
        optimizers = [
            rule([model[0].weight], lr=0.02),
            torch.optim.AdamW(rest_of(model), lr=0.01),
        ]
    noise = dd.NoiseModel.fit(X, components)
    return X, y, model, optimizers, dd.decouple(model, *optimizers, noise=noise, head=True)


KINDS = ["together", *(["muon"] if hasattr(torch.optim, "Muon") else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_saved_states(kind):
    X, y, model, optimizers, tracker = build(kind)
    train(model, optimizers, full(X, y, 5))
    states = states_from_file([model, *optimizers, tracker])
    train(model, optimizers, full(X, y, 5))
    _, _, again, again_optimizers, again_tracker = build(kind)
    load_all([again, *again_optimizers, again_tracker], states)
    train(again, again_optimizers, full(X, y, 5))
    found = displacements(again_tracker._state, again), displacements(tracker._state, model)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_head_corrected_is_nearer_to_the_test_loss():
    n, d = 300, 60
    gaps = []
    for head in (False, True):
        for seed in range(4):
            (X, y, components), (X_test, y_test, _) = problem(seed=seed, n=n, d=d, size=3.0)
            model = network(d=d, k=16, seed=seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            noise = dd.NoiseModel.fit(X, components)
            tracker = dd.decouple(model, optimizer, noise=noise, head=head)
            train(model, [optimizer], full(X, y, 40))
            losses = lambda b, model=model: nn.functional.cross_entropy(  # noqa: E731
                model(b[0]), b[1]
            )
            reported = tracker.evaluate([(X, y)], losses)
            with torch.no_grad():
                test = nn.functional.cross_entropy(model.eval()(X_test), y_test)
            gaps.append(float(reported - test))
    plain, corrected = sum(gaps[:4]) / 4, sum(gaps[4:]) / 4
    # Thirty-four shared numbers of the head and 64 along the means over-fit 300 samples.
    assert plain < 0
    assert abs(corrected) < abs(plain)


def test_states_of_another_head_are_refused():
    X, y, model, optimizers, tracker = build()
    train(model, optimizers, full(X, y, 1))
    state = tracker.state_dict()
    tracker.detach()
    other = dd.decouple(model, *optimizers, noise=dd.NoiseModel.fit(X, problem()[0][2]))
    with refused("another head="):
        other.load_state_dict(state)


def test_rules_without_a_derivative_are_refused_by_name():
    model = network()
    with refused("head=True follows the head and biases by the rules of SGD.*Rprop moves one"):
        dd.decouple(
            model,
            torch.optim.SGD([model[0].weight], lr=0.1),
            torch.optim.Rprop(rest_of(model)),
            head=True,
        )


def test_second_step_of_the_heads_optimizer_is_refused():
    X, y, model, optimizers, _ = build("apart")
    nn.functional.cross_entropy(model(X), y).backward()
    optimizers[1].step()
    with refused("steps twice"):
        optimizers[1].step()


def test_step_on_gradients_of_no_forward_is_refused():
    X, y, model, optimizers, _ = build("apart")
    train(model, optimizers, full(X, y, 2))
    with refused("gradients of no training forward"):
        optimizers[1].step()


def test_displacements_go_with_weights_that_are_swapped():
    (X, y, components), _ = problem()
    model = network()
    optimizer = Averaging([model[0].weight], lr=0.5)
    head = torch.optim.SGD(rest_of(model), lr=0.1)
    noise = dd.NoiseModel.fit(X, components)
    tracker = dd.decouple(model, optimizer, head, noise=noise, head=True)
    train(model, [optimizer, head], full(X, y, 8))
    state = tracker._state[model[0].weight]
    at_y, at_z = state["signal_shadow"].clone(), state["signal_shadow.state.z"].clone()
    assert at_y.norm() > 0
    optimizer.swap(train=False)
    tracker.evaluate([(X, y)], lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))
    # y = 0.1 z + 0.9 x
    expected = (at_y - 0.1 * at_z) / 0.9
    torch.testing.assert_close(state["signal_shadow"], expected, rtol=1e-3, atol=1e-6)
    optimizer.swap(train=True)
    tracker.evaluate([(X, y)], lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))
    torch.testing.assert_close(state["signal_shadow"], at_y, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["together", "apart"])
def test_displacements_of_a_zeroed_state_are_zero(kind):
    X, y, model, optimizers, tracker = build(kind)
    train(model, optimizers, full(X, y, 3))
    weight = model[2].weight
    for name in ("exp_avg", "exp_avg_sq"):
        optimizers[-1].state[weight][name].zero_()
    before = tracker._state[weight]["shadow.exp_avg"].clone()
    train(model, optimizers, full(X, y, 1))
    after = tracker._state[weight]["shadow.exp_avg"]
    # A tenth of a new gradient's alone, where nine tenths of the old would have stayed.
    assert torch.linalg.vector_norm(after) < 0.5 * torch.linalg.vector_norm(before)


@pytest.mark.parametrize("kind", ["together", "apart"])
def test_state_of_the_head_that_was_loaded_alone_is_refused(kind):
    X, y, model, optimizers, _ = build(kind)
    train(model, optimizers, full(X, y, 3))
    optimizers[-1].state[model[2].weight]["exp_avg"].mul_(2)
    with refused("'exp_avg' in the optimizer's state of the head or of a bias is not what"):
        train(model, optimizers, full(X, y, 1))
