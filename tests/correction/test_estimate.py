"""Confidence intervals of the tracked loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dd
from dd.correction.estimate import Estimate
from dd.correction.evaluation import corrected_in_eval_mode

N, D, K, C = 60, 12, 3, 2


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, K), nn.GELU(), nn.Dropout(0.5), nn.Linear(K, C)).double()
    inputs, labels = torch.randn(N, D).double(), torch.arange(N) % C
    optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.isotropic(inputs))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, optimizer, inputs, labels


def losses_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def figures_of(model):
    def figures(batch):
        scores = model(batch[0])
        loss = F.cross_entropy(scores, batch[1], reduction="none")
        return torch.stack([loss, (scores.argmax(1) != batch[1]).double()], 1)

    return figures


def of(values, confidence=0.9):
    return Estimate.of_sums(values.sum(0), values.square().sum(0), len(values), confidence)


def test_value_is_that_of_evaluate_and_batches_do_not_matter():
    model, optimizer, inputs, labels = make()
    losses = losses_of(model)
    whole = optimizer.estimate([(inputs, labels)], losses)
    parts = [(inputs[i : i + 25], labels[i : i + 25]) for i in range(0, N, 25)]
    split = optimizer.estimate(parts, losses)
    mean = optimizer.evaluate([(inputs, labels)], lambda batch: losses(batch).mean())
    assert float(whole.value) == pytest.approx(float(mean), rel=1e-12)
    assert whole.num_samples == split.num_samples == N
    for one, other in ((whole.value, split.value), (whole.lower, split.lower)):
        assert float(one) == pytest.approx(float(other), rel=1e-12)


def test_values_are_the_corrected_ones():
    model, optimizer, inputs, labels = make()
    found = optimizer.estimate([(inputs, labels)], losses_of(model))
    model.eval()
    with torch.no_grad():
        corrected = model[0](inputs) + optimizer.shadow.sum(0)
        expected = F.cross_entropy(model[1:](corrected), labels)
        plain = F.cross_entropy(model(inputs), labels)
    assert float(found.value) == pytest.approx(float(expected), rel=1e-12)
    assert abs(float(plain) - float(expected)) > 1e-3


def test_an_interval_of_a_loss_is_a_mean_and_its_standard_errors():
    values = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)).double()
    found = of(values, 0.95)
    half = 1.7 * 1.959963984540054 * values.std(0) / math.sqrt(500)
    torch.testing.assert_close(found.value, values.mean(0))
    torch.testing.assert_close(found.upper - found.value, half)
    torch.testing.assert_close(found.value - found.lower, half)


@given(st.integers(2, 300), st.integers(0, 300), st.sampled_from([0.5, 0.9, 0.99]))
def test_an_interval_of_an_error_is_where_the_score_test_does_not_reject(n, wrong, confidence):
    wrong = min(wrong, n)
    found = of((torch.arange(n) < wrong).double(), confidence)
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + confidence) / 2).double())
    share = wrong / n
    for end in (float(found.lower), float(found.upper)):
        end = min(max(end, 0.0), 1.0)
        assert (share - end) ** 2 == pytest.approx(
            (1.7 * float(z)) ** 2 * end * (1 - end) / n, rel=1e-5, abs=1e-12
        )
    assert float(found.lower) <= share + 1e-12
    assert float(found.upper) >= share - 1e-12


@pytest.mark.parametrize(("confidence", "wider"), [(0.5, 0.7485), (0.9, 0.9948)])
def test_independent_errors_are_covered_as_often_as_a_wider_interval_is(confidence, wider):
    # P(|Z| < 1.7 z) for a standard normal Z.
    # 2000 draws: a standard error of the frequency is at most 0.011; four of them.
    g = torch.Generator().manual_seed(0)
    draws = (torch.rand(2000, 300, generator=g) < 0.2).double()
    found = of(draws.T, confidence)
    covered = ((found.lower <= 0.2) & (found.upper >= 0.2)).double().mean()
    # At n = 300 the error takes steps of 1/300, which moves the frequency by up to 0.02 more.
    assert float(covered) == pytest.approx(wider, abs=0.045 + 0.02)


def test_several_figures_come_in_one_pass():
    model, optimizer, inputs, labels = make()
    found = optimizer.estimate([(inputs, labels)], figures_of(model), confidence=0.8)
    single = optimizer.estimate([(inputs, labels)], losses_of(model), confidence=0.8)
    assert found.value.shape == (2,)
    assert float(found.lower[0]) == pytest.approx(float(single.lower), rel=1e-12)
    text = str(found)
    assert text.count("80 %") == 2
    assert f"n = {N}" in text


def test_nothing_is_changed():
    model, optimizer, inputs, labels = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shadow = optimizer.shadow.clone()
    optimizer.estimate([(inputs, labels)], losses_of(model))
    assert model.training
    assert torch.equal(shadow, optimizer.shadow)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 90, float("nan")])
def test_a_confidence_that_is_no_probability(confidence):
    model, optimizer, inputs, labels = make()
    with pytest.raises(ValueError, match="between 0 and 1"):
        optimizer.estimate([(inputs, labels)], losses_of(model), confidence)


def test_losses_that_are_not_one_a_sample():
    model, optimizer, inputs, labels = make()
    with pytest.raises(ValueError, match='reduction="none"'):
        optimizer.estimate(
            [(inputs, labels)], lambda batch: F.cross_entropy(model(batch[0]), batch[1])
        )
    with pytest.raises(ValueError, match="got no batches"):
        optimizer.estimate([], losses_of(model))
    with pytest.raises(ValueError, match="two samples"):
        optimizer.estimate([(inputs[:1], labels[:1])], losses_of(model))
    with pytest.raises(RuntimeError, match="did not pass through"):
        optimizer.estimate([(inputs, labels)], lambda batch: torch.zeros(N))
    with pytest.raises(ValueError, match="needs an attached optimizer"):
        dd.DecoupledDescent(list(model.parameters()), lr=0.1).estimate([], losses_of(model))


def test_what_is_not_to_be_believed_says_so():
    values = torch.full((50, 2), 0.5).double()
    sure = of(values)
    doubted = replace(sure, doubts=("The one reason.", "The other."))
    assert sure.doubts == ()
    assert str(doubted) == f"{sure}, not to be believed: The one reason. The other."
    assert "believed" not in str(sure)


def test_rows_of_a_sample_that_comes_again_tell_nothing_new():
    """As a sampler with replacement, a padded or a concatenated one brings them."""
    model, optimizer, inputs, labels = make()
    once = optimizer.estimate([(inputs, labels)], losses_of(model))
    twice = torch.arange(N).repeat(2)
    for order in (twice, twice.flip(0)):
        batches = [(inputs[i], labels[i]) for i in order.split(25)]
        again = optimizer.estimate(batches, losses_of(model))
        assert again.num_samples == N
        for name in ("value", "lower", "upper"):
            assert float(getattr(again, name)) == pytest.approx(float(getattr(once, name)), 1e-9)
    # Kish: (60 + 30)² / (30 · 1 + 30 · 4) = 54 samples are left of 60, half of which come twice.
    order = torch.cat([torch.arange(N), torch.arange(N // 2)])
    some = optimizer.estimate([(inputs[order], labels[order])], losses_of(model))
    values = losses_of(model)
    with corrected_in_eval_mode(optimizer._attachment), torch.no_grad():
        found = values((inputs[order], labels[order]))
    half = float(some.upper - some.value)
    z = 1.7 * 1.6448536269514722
    assert half == pytest.approx(z * float(found.var(correction=0)) ** 0.5 / 53**0.5, rel=1e-9)


def test_copies_among_the_samples_count_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, K), nn.GELU(), nn.Linear(K, C)).double()
    half, labels = torch.randn(N, D).double(), torch.arange(N) % C
    inputs, labels = half.repeat(2, 1), labels.repeat(2)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=dd.NoiseModel.fit(inputs))
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    found = optimizer.estimate([(inputs, labels)], losses_of(model))
    assert found.num_samples == N
    resumed = nn.Sequential(nn.Linear(D, K), nn.GELU(), nn.Linear(K, C)).double()
    resumed.load_state_dict(model.state_dict())
    other = dd.DecoupledDescent(resumed, lr=0.1, noise=dd.NoiseModel.fit(inputs))
    other.load_state_dict(optimizer.state_dict())
    again = other.estimate([(inputs, labels)], losses_of(resumed))
    assert again.num_samples == N
    assert torch.equal(again.upper, found.upper)


def test_predictions_are_the_corrected_outputs_in_the_order_of_the_batches():
    model, optimizer, inputs, _ = make()
    order = torch.arange(N - 1, -1, -1)
    parts = [inputs[rows] for rows in order.split(25)]
    found = optimizer.predict(parts)
    assert model.training
    assert type(found) is torch.Tensor
    model.eval()
    with torch.no_grad():
        expected = model[1:](model[0](inputs) + optimizer.shadow.sum(0))
        plain = model(inputs)
    torch.testing.assert_close(found, expected[order], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, plain[order], rtol=1e-3)
    with pytest.raises(ValueError, match="no batches"):
        optimizer.predict([])
