"""``stop="auto"``: when training ends, and what it leaves."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.rules.line_search.search import NO_MOVE, Point
from dd.rules.line_search.stopping import PATIENCE, STANDARD_ERRORS, Outputs, StopRule
from tests.closures import closure_of

N, D, K, C = 60, 30, 4, 3


def make_problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    means = 1.5 * torch.randn(C, D, generator=g, dtype=torch.float64)
    inputs = means[labels] + torch.randn(N, D, generator=g, dtype=torch.float64)
    return inputs, labels


def make_model(between=(), seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K), *between, nn.Tanh(), nn.Linear(K, C)).double()


def attached(model, inputs, labels, policy=None, **settings):
    noise = dd.NoiseModel.isotropic(inputs)
    optimizer = dd.DecoupledDescent(model, lr="auto", stop="auto", noise=noise, **settings)
    if policy is not None:
        optimizer._policy = policy

    closure = closure_of(model, optimizer, inputs, labels)

    return optimizer, closure


class Steps:
    """Goes through given points; is searching from a step on."""

    def __init__(self, points, searching_from=0):
        self.points, self.searching_from = points, searching_from

    def choose(self, family, memory):
        step = int(memory.get("step", 0))
        memory["step"] = step + 1
        if step >= self.searching_from:
            memory["searching"] = 1.0
        return self.points[step]


def gradient_step(rate):
    return Point(1.0, rate, 0.0, 0.0, rate)


def run(optimizer, closure, steps):
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
        if optimizer.stopped:
            break
    return losses


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


# --- The rule -----------------------------------------------------------------------------------


class Given(Outputs):
    """Scores and their gradient as given."""

    def __init__(self, scores, gradient):
        super().__init__()
        self._found, self._gradients = [scores], {0: gradient}


def quadratic(scores):
    """Losses f² of every sample, their mean, and its derivative in the scores."""
    losses = scores.square().sum(1)
    return losses, float(losses.mean()), 2 * scores / len(scores)


def test_standard_error_is_that_of_the_samples_own_changes():
    # The rule integrates by trapezoids, which are exact for a quadratic loss.
    g = torch.Generator().manual_seed(2)
    state, memory = {}, {}
    rule = StopRule(state, memory)
    first = scores = torch.randn(N, 2, generator=g).double()
    for step in range(4):
        losses, mean, gradient = quadratic(scores)
        # Never an improvement, so that the reference stays.
        memory["searching"] = float(step > 0)
        rule.look(mean + 100.0 * step, Given(scores, gradient))
        scores = scores + 0.3 * torch.randn(N, 2, generator=g).double()
    change = losses - quadratic(first)[0]
    torch.testing.assert_close(state["shadow_loss_change"], change)
    assert StopRule.standard_error(change) == pytest.approx(float(change.std()) / math.sqrt(N))


@pytest.mark.parametrize(("share", "stops"), [(0.9, True), (1.1, False)])
def test_training_goes_on_while_it_improves_by_two_standard_errors(share, stops):
    g = torch.Generator().manual_seed(3)
    state, memory = {}, {"searching": 1.0}
    rule = StopRule(state, memory)
    scores = torch.randn(N, 2, generator=g).double()
    reference, loss, gradient = quadratic(scores)
    rule.look(loss, Given(scores, gradient))
    for _ in range(PATIENCE):
        if memory["stalled"] == 0:
            reference = quadratic(scores)[0]
        scores = scores + 0.1 * torch.randn(N, 2, generator=g).double()
        losses, _, gradient = quadratic(scores)
        needed = STANDARD_ERRORS * StopRule.standard_error(losses - reference)
        loss = memory["reference"] - share * needed
        rule.look(loss, Given(scores, gradient))
    assert rule.stopped == stops


def test_nothing_stops_before_the_search():
    scores = torch.ones(N, 1).double()
    memory = {}
    rule = StopRule({}, memory)
    for _ in range(3 * PATIENCE):
        assert not rule.look(1.0, Given(scores, scores))
    assert not rule.stopped
    memory["searching"] = 1.0
    for _ in range(PATIENCE):
        assert not rule.stopped
        rule.look(1.0, Given(scores, scores))
    assert rule.stopped


def test_scores_are_those_of_the_loss_whatever_form_the_output_has():
    torch.manual_seed(0)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            y = self.linear(x)
            return {"logits": y, "hidden": [y.sum(1), None], "unused": y * 2}

    module, x = Several(), torch.randn(5, 3)
    outputs = Outputs()
    with outputs.watched(module):
        found = module(x)
        loss = found["logits"].square().sum() + 3 * found["hidden"][0].sum()
        loss.backward()
    outputs.require(5)
    logits = found["logits"].detach()
    # The loss is quadratic in what is used, so that the gradient of each use is known.
    torch.testing.assert_close(outputs.gradient[:, :2], 2 * logits)
    torch.testing.assert_close(outputs.scores, torch.cat([logits, logits.sum(1, True)], 1))
    torch.testing.assert_close(outputs.gradient[:, 2], torch.full((5,), 3.0))
    module(x)
    assert outputs.scores.shape == (5, 3)


# --- The optimizer --------------------------------------------------------------------------------


def test_the_best_weights_are_put_back_and_stay():
    inputs, labels = make_problem()
    model = make_model()
    worse = gradient_step(-2.0)
    points = [gradient_step(1.0)] * 4 + [worse] * PATIENCE + [NO_MOVE]
    optimizer, closure = attached(model, inputs, labels, Steps(points))
    losses, kept = [], []
    while not optimizer.stopped:
        kept.append((weights_of(model), optimizer.shadow))
        kept[-1] = (kept[-1][0], None if kept[-1][1] is None else kept[-1][1].clone())
        losses.append(float(optimizer.step(closure).detach()))
        assert len(losses) < 30
    best = min(range(len(losses)), key=losses.__getitem__)
    assert best == 4
    assert len(losses) == best + 1 + PATIENCE
    weights, shadow = kept[best]
    assert all(map(torch.equal, weights_of(model), weights))
    assert torch.equal(optimizer.shadow, shadow)
    for _ in range(2):
        assert float(optimizer.step(closure).detach()) == pytest.approx(losses[best], rel=1e-12)
    assert all(map(torch.equal, weights_of(model), weights))


def test_batch_statistics_are_those_of_the_best_weights():
    inputs, labels = make_problem()
    model = make_model([nn.BatchNorm1d(K)])
    points = [gradient_step(0.5)] * 3 + [gradient_step(-1.0)] * (PATIENCE + 3)
    optimizer, closure = attached(model, inputs, labels, Steps(points))
    kept = []
    while not optimizer.stopped:
        buffers = [b.clone() for b in model.buffers()]
        kept.append((float(optimizer.step(closure).detach()), buffers))
    expected = min(kept, key=lambda one: one[0])[1]
    for found, own in zip(model.buffers(), expected, strict=True):
        if found.is_floating_point():
            torch.testing.assert_close(found, own)


def test_training_by_itself_ends_and_its_loss_is_the_lowest():
    inputs, labels = make_problem()
    model = make_model()
    optimizer, closure = attached(model, inputs, labels)
    losses = run(optimizer, closure, 200)
    assert optimizer.stopped
    with torch.no_grad():
        assert float(F.cross_entropy(model(inputs), labels)) == pytest.approx(min(losses))


def test_restore_best_before_training_stops():
    inputs, labels = make_problem()
    model = make_model()
    points = [gradient_step(1.0)] * 3 + [gradient_step(-3.0)] * 2 + [gradient_step(0.1)] * 4
    optimizer, closure = attached(model, inputs, labels, Steps(points))
    with pytest.raises(RuntimeError, match="found no best weights"):
        optimizer.restore_best()
    kept = []
    for _ in range(5):
        kept.append(weights_of(model))
        optimizer.step(closure)
    optimizer.restore_best()
    assert all(map(torch.equal, weights_of(model), kept[3]))
    # Training can go on from there.
    assert float(optimizer.step(closure).detach()) < math.inf
    assert not optimizer.stopped


@pytest.mark.parametrize("way", ["state", "pickle", "copy"])
def test_a_copy_stops_when_the_original_does(way):
    inputs, labels = make_problem()
    one = make_model()
    optimizer, closure = attached(one, inputs, labels)
    run(optimizer, closure, 12)
    if way == "state":
        twin, twin_closure = attached(make_model(seed=1), inputs, labels)
        other = twin._attachment.module
        other.load_state_dict(one.state_dict())
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (one, optimizer)
        written = pickle.dumps(pair)
        other, twin = copy.deepcopy(pair) if way == "copy" else pickle.loads(written)  # noqa: S301

        def twin_closure():
            twin.zero_grad()
            loss = F.cross_entropy(other(inputs), labels)
            loss.backward()
            return loss

    assert run(optimizer, closure, 200) == run(twin, twin_closure, 200)
    assert twin.stopped
    assert all(map(torch.equal, weights_of(one), weights_of(other)))


def test_settings_that_it_does_not_go_with():
    inputs, _ = make_problem()
    noise = dd.NoiseModel.isotropic(inputs)
    with pytest.raises(ValueError, match='needs lr="auto"'):
        dd.DecoupledDescent(make_model(), lr=0.1, stop="auto", noise=noise)
    with pytest.raises(ValueError, match='must be None or "auto"'):
        dd.DecoupledDescent(make_model(), lr="auto", stop=10, noise=noise)


def test_a_loss_that_does_not_come_from_the_modules_output():
    inputs, labels = make_problem()
    model = make_model()
    optimizer, _ = attached(model, inputs, labels)

    def by_layers():
        optimizer.zero_grad()
        loss = F.cross_entropy(model[2](torch.tanh(model[0](inputs))), labels)
        loss.backward()
        return loss

    before = weights_of(model)
    with pytest.raises(RuntimeError, match="what the attached module returns"):
        optimizer.step(by_layers)
    assert all(map(torch.equal, weights_of(model), before))
