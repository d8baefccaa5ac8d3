"""``dd.decouple`` beside states that are cleared, loaded, swapped or saved at odd moments."""

import copy

import pytest
import torch
from torch import nn

import dd
from tests.test_decouple import Averaging, decoupled, full, network, problem, refused, train

MAKERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("how", ["cleared", "zeroed"])
def test_state_begun_anew_has_a_shadow_of_zero(make, how):
    X, y, model, optimizer, tracker = decoupled(make)
    train(model, [optimizer], full(X, y, 6))
    weight, kept = model[0].weight, tracker._state[model[0].weight]
    followed = list(tracker._rule.identifier.followed)
    assert followed
    before = {key: kept[f"shadow.state.{key}"].clone() for key in followed}
    assert all(value.norm() > 0 for value in before.values())
    state = optimizer.state[weight]
    if how == "cleared":
        state.clear()
    else:
        for key in followed:
            state[key].zero_()
    fresh = decoupled(make)
    train(model, [optimizer], full(X, y, 1))
    train(fresh[2], [fresh[3]], full(X, y, 1))
    # One step pushes as much as any: what is left is of the size of the first one's.
    first = fresh[4]._state[fresh[2][0].weight]
    for key in followed:
        after = kept[f"shadow.state.{key}"].norm()
        assert after < 2 * first[f"shadow.state.{key}"].norm()
        assert after < 0.7 * before[key].norm()


def test_state_of_an_earlier_step_alone_is_refused():
    X, y, model, optimizer, _ = decoupled(MAKERS["AdamW"])
    train(model, [optimizer], full(X, y, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, [optimizer], full(X, y, 3))
    optimizer.load_state_dict(saved)
    with refused("is not what the last step left"):
        train(model, [optimizer], full(X, y, 1))


def test_weights_of_a_detached_tracker_are_told():
    X, y, model, optimizer, tracker = decoupled(lambda p: torch.optim.SGD(p, lr=0.3))
    train(model, [optimizer], full(X, y, 3))
    tracker.detach()
    again = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, problem()[0][2]))
    with pytest.warns(UserWarning, match="was trained by another optimizer"):
        train(model, [optimizer], full(X, y, 1))
    assert again.response.exact


def test_optimizer_decoupled_twice_follows_the_second_tracker():
    X, y, model, optimizer, first = decoupled(MAKERS["AdamW"])
    second = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, problem()[0][2]))
    train(model, [optimizer], full(X, y, 3))
    assert second.shadow.norm() > 0
    with refused("another optimizer was attached"):
        first.evaluate([(X, y)], lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))


@pytest.mark.parametrize("saved_in", ["train", "eval"])
def test_swapped_weights_are_followed_after_a_resume(saved_in):
    (X, y, components), _ = problem()
    noise, shadows = dd.NoiseModel.fit(X, components), []

    def build():
        model = network()
        optimizer = Averaging([model[0].weight], lr=0.5)
        return model, optimizer, dd.decouple(model, optimizer, noise=noise)

    for resumes in (False, True):
        model, optimizer, tracker = build()
        train(model, [optimizer], full(X, y, 6))
        if resumes:
            optimizer.swap(train=saved_in == "train")
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, tracker)]
            model, optimizer, tracker = build()
            for part, state in zip((model, optimizer, tracker), states, strict=True):
                part.load_state_dict(state)
        optimizer.swap(train=False)
        loss = lambda b: nn.functional.cross_entropy(model(b[0]), b[1])  # noqa: B023, E731
        shadows.append((tracker.evaluate([(X, y)], loss), tracker.shadow.clone()))
        optimizer.swap(train=True)
        train(model, [optimizer], full(X, y, 3))
        shadows.append((tracker.evaluate([(X, y)], loss), tracker.shadow.clone()))
    (swapped, after), (swapped_again, after_again) = shadows[:2], shadows[2:]
    for one, other in ((swapped, swapped_again), (after, after_again)):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-4)


def test_shadow_is_that_of_swapped_weights_at_once():
    X, y, model, optimizer, tracker = decoupled(lambda p: Averaging(p, lr=0.5))
    train(model, [optimizer], full(X, y, 6))
    before = tracker.shadow.clone()
    optimizer.swap(train=False)
    assert not torch.allclose(tracker.shadow, before)


def test_samples_that_come_after_a_resume_get_shadows():
    (X, y, _), _ = problem()
    noise = dd.NoiseModel(torch.tensor([1.0]), torch.tensor([60.0]))
    parts, shadows = torch.arange(len(X)).split(80), []

    def build():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, dd.decouple(model, optimizer, noise=noise)

    for resumes in (False, True):
        model, optimizer, tracker = build()
        for epoch in range(2):
            for at, rows in enumerate(parts):
                if resumes and epoch == 0 and at == 2:
                    states = [copy.deepcopy(p.state_dict()) for p in (model, optimizer, tracker)]
                    model, optimizer, tracker = build()
                    for part, state in zip((model, optimizer, tracker), states, strict=True):
                        part.load_state_dict(state)
                tracker.batch(rows)
                train(model, [optimizer], [(X[rows], y[rows])])
        shadows.append(tracker.shadow.clone())
    torch.testing.assert_close(*shadows, rtol=1e-4, atol=1e-5)


def test_state_goes_into_a_compiled_model():
    X, y, model, optimizer, tracker = decoupled(MAKERS["AdamW"])
    train(model, [optimizer], full(X, y, 2))
    state = tracker.state_dict()
    tracker.detach()
    compiled = torch.compile(model, backend="eager")
    again = dd.decouple(compiled, optimizer, noise=dd.NoiseModel.fit(X, problem()[0][2]))
    again.load_state_dict(state)
    assert torch.equal(again.shadow, state["state"]["shadow"])


def test_state_without_a_part_is_refused_and_nothing_lost():
    X, y, model, optimizer, tracker = decoupled(MAKERS["AdamW"])
    train(model, [optimizer], full(X, y, 2))
    state, before = tracker.state_dict(), tracker.shadow.clone()
    del state["response"]
    with refused("the state lacks response"):
        tracker.load_state_dict(state)
    assert torch.equal(tracker.shadow, before)


def test_value_clipping_after_a_skipped_step_is_followed():
    X, y, model, optimizer, tracker = decoupled(MAKERS["AdamW"])
    nn.functional.cross_entropy(model(X), y).backward()
    optimizer.zero_grad()

    def clip():
        nn.utils.clip_grad_value_(model.parameters(), 0.002)

    train(model, [optimizer], full(X, y, 2), clip)
    assert tracker.shadow.norm() > 0


def test_group_added_later_is_seen():
    (X, y, components), _ = problem()
    model = network()
    optimizer = torch.optim.AdamW([model[0].weight, model[0].bias], lr=0.01)
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, [optimizer], full(X, y, 1))
    assert len(tracker._store().groups) == 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with 2.9")
def test_muon_after_a_long_warm_up_is_followed_across_units():
    X, y, model, _, _ = decoupled(MAKERS["AdamW"])
    model = network()
    optimizer = torch.optim.Muon([model[0].weight], lr=0.0)
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, problem()[0][2]))
    train(model, [optimizer], full(X, y, 12))
    optimizer.param_groups[0]["lr"] = 0.02
    train(model, [optimizer], full(X, y, 1))
    assert tracker.response.exact
    assert tracker.response.across_units


@pytest.mark.parametrize("inputs", [2, 3, 5])
def test_few_inputs_are_followed_as_the_closed_rule_follows_them(inputs):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(120, inputs, generator=generator)
    y = (X[:, 0] + torch.randn(120, generator=generator) > 0).long()
    noise, shadows = dd.NoiseModel.fit(X, y), []
    for identified in (True, False):
        model = network(d=inputs)
        if identified:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            tracker = dd.decouple(model, optimizer, noise=noise, curvature="probe")
        else:
            optimizer = tracker = dd.DecoupledDescent(
                model, lr=0.05, momentum=0.9, noise=noise, curvature="probe", head=False
            )
        train(model, [optimizer], full(X, y, 30))
        shadows.append(tracker.shadow.clone())
    found, expected = shadows
    assert torch.linalg.vector_norm(found - expected) < 1e-3 * torch.linalg.vector_norm(expected)


def test_shadows_out_of_proportion_are_told_sooner():
    (X, y, _), _ = problem()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    noise = dd.NoiseModel(torch.tensor([30.0]), torch.tensor([float(X.shape[1])]))
    dd.decouple(model, optimizer, noise=noise)
    # Four samples to an input: the closed rule is believed up to 0.75.
    with pytest.warns(dd.ShadowWarning, match="the theory explains 0.6 at most"):
        train(model, [optimizer], full(X, y, 10))


def test_weights_in_half_precision_are_told():
    (X, y, components), _ = problem()
    model = network(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    with pytest.warns(dd.ResponseWarning, match="Keep the weights in float32"):
        train(model, [optimizer], full(X.bfloat16(), y, 3))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_forwards_under_autocast_are_followed_as_others(name):
    (X, y, components), _ = problem()
    shadows = []
    for enabled in (False, True):
        model = network()
        make = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
        optimizer = make(model.parameters(), lr=0.01 if name == "AdamW" else 0.3)
        tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            tracker.evaluate([(X, y)], lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))  # noqa: B023
        shadows.append(tracker.shadow)
    exact, rounded = shadows
    # Pre-activations of eight bits, whose errors a few steps add up.
    assert torch.linalg.vector_norm(rounded - exact) < 0.1 * torch.linalg.vector_norm(exact)
