"""Tracked errors of averages of the weights beside a model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dd
from tests.test_decouple import full, mini, network, problem, refused, train


def build(rate=0.9, n=240, d=60, k=4, size=2.5):
    (X, y, components), test = problem(n=n, d=d, size=size)
    model = network(d=d, k=k)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    function = None if rate is None else get_ema_multi_avg_fn(rate)
    averaged = AveragedModel(model, multi_avg_fn=function)
    return X, y, test, model, optimizer, tracker, averaged


def losses(model):
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("batches", [full, mini])
@pytest.mark.parametrize("rate", [0.9, None])
@pytest.mark.parametrize("every", [1, 3])
def test_shadow_of_an_average_is_the_average_of_shadows(batches, rate, every):
    X, y, _, model, optimizer, tracker, averaged = build(rate)
    average = tracker.average(averaged)
    expected, count = None, 0
    for at, batch in enumerate(batches(X, y, 9)):
        train(model, [optimizer], [batch])
        if at % every:
            continue
        averaged.update_parameters(model)
        shadow = tracker.shadow.clone()
        # The first update of torch's averaged model is a copy.
        share = 1.0 if expected is None else 1 / (count + 1) if rate is None else 1 - rate
        expected = shadow if expected is None else torch.lerp(expected, shadow, share)
        count += 1
    # Coefficients from single precision, of weights that have moved by a hundredth.
    off = torch.linalg.vector_norm(average.shadow - expected)
    assert off < 1e-3 * torch.linalg.vector_norm(expected)


def test_tracked_loss_of_an_average_is_its_test_loss():
    X, y, (X_test, y_test, _), model, optimizer, tracker, averaged = build(
        n=1200, d=300, k=8, size=3.0
    )
    average = tracker.average(averaged)
    for _ in range(60):
        train(model, [optimizer], full(X, y, 1))
        averaged.update_parameters(model)
    tracked = average.evaluate([(X, y)], losses(averaged))
    averaged.eval()
    with torch.no_grad():
        test, plain = losses(averaged)((X_test, y_test)), losses(averaged)((X, y))
    assert test - plain > 0.03
    assert (tracked - test).abs() < (test - plain) / 3


def test_model_and_average_do_not_disturb_each_other():
    found = []
    for has_average in (True, False):
        X, y, _, model, optimizer, tracker, averaged = build()
        average = tracker.average(averaged) if has_average else None
        for _ in range(4):
            train(model, [optimizer], full(X, y, 1))
            averaged.update_parameters(model)
            if average is not None:
                average.evaluate([(X, y)], losses(averaged))
        found.append(tracker.shadow.clone())
    assert torch.equal(*found)


def test_average_goes_on_from_a_saved_state():
    X, y, _, model, optimizer, tracker, averaged = build()
    average = tracker.average(averaged)

    def go_on(steps, model, optimizer, averaged):
        for _ in range(steps):
            train(model, [optimizer], full(X, y, 1))
            averaged.update_parameters(model)

    go_on(3, model, optimizer, averaged)
    states = [copy.deepcopy(p.state_dict()) for p in (model, optimizer, averaged, tracker)]
    go_on(3, model, optimizer, averaged)
    _, _, _, model, optimizer, again, averaged = build()
    other = again.average(averaged)
    for part, state in zip((model, optimizer, averaged, again), states, strict=True):
        part.load_state_dict(state)
    go_on(3, model, optimizer, averaged)
    assert torch.equal(other.shadow, average.shadow)


def test_other_changes_of_an_average_are_refused():
    X, y, _, model, optimizer, tracker, averaged = build()
    tracker.average(averaged)
    train(model, [optimizer], full(X, y, 2))
    with torch.no_grad():
        averaged.module[0].weight.add_(torch.randn_like(averaged.module[0].weight))
    with refused("no combination"):
        train(model, [optimizer], full(X, y, 1))


def test_what_is_no_copy_is_refused():
    _, _, _, model, _, tracker, _ = build()
    with refused("no linear layer"):
        tracker.average(nn.Sequential(nn.Linear(3, 2)))
    with refused("has other weights"):
        tracker.average(network(seed=5))
    tracker.detach()
    with refused("needs an attached optimizer"):
        tracker.average(copy.deepcopy(model))


def test_detached_average_is_a_plain_model():
    X, y, _, model, optimizer, tracker, averaged = build()
    tracker.average(averaged)
    train(model, [optimizer], full(X, y, 2))
    averaged.update_parameters(model)
    tracker.detach()
    assert not averaged.module[0]._forward_hooks
