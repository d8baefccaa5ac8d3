"""Noise models of other samples, or of the same ones in other units."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.layer_forward import place
from dd.data import Split

N, D = 120, 20


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), torch.arange(N) % 2


def optimizer_of(noise, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    return model, dd.DecoupledDescent(model, lr=0.1, noise=noise)


def step(model, optimizer, inputs, targets, rows=None):
    if rows is not None:
        optimizer.batch(rows)
        inputs, targets = inputs[rows], targets[rows]
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("fit", [dd.NoiseModel.fit, dd.NoiseModel.isotropic])
def test_other_units_and_other_rows_are_refused(labelled, fit):
    inputs, targets = problem()
    noise = fit(inputs, targets if labelled else None)
    model, optimizer = optimizer_of(noise)
    message = rf"fitted on {N} inputs, and {N} of the {N} that the decoupled layer receives.*"
    with pytest.raises(ValueError, match=message + r"vary 0\.33 times as much.*fingerprints=None"):
        step(model, optimizer, inputs / 3, targets)
    with pytest.raises(ValueError, match=message):
        step(model, optimizer, problem(1)[0], targets)
    step(model, optimizer, inputs, targets)
    optimizer.detach()
    optimizer.attach(model, noise=dataclasses.replace(noise, fingerprints=None))
    with pytest.warns(UserWarning, match="was trained by another optimizer"):
        step(model, optimizer, inputs / 3, targets)


def test_some_other_rows_are_refused():
    inputs, targets = problem()
    model, optimizer = optimizer_of(dd.NoiseModel.isotropic(inputs))
    mixed = torch.cat([inputs[:90], problem(1)[0][:30]])
    with pytest.raises(ValueError, match=rf"and 30 of the {N} that"):
        step(model, optimizer, mixed, targets)


@pytest.mark.parametrize("order", [torch.arange(N), torch.arange(N).flip(0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precision_is_no_other_sample(dtype, order):
    inputs, targets = problem()
    noise = dd.NoiseModel.isotropic(inputs, targets if dtype != torch.float16 else None)
    model, optimizer = optimizer_of(noise, dtype if dtype == torch.float64 else torch.float32)
    given = inputs[order].to(dtype)
    placement = place(optimizer._attachment, given, {}, binds=True)
    index = order if placement.index is None else placement.index
    assert torch.equal(index, order)
    model.eval()


def test_a_shift_and_another_estimate_of_the_scale_are_no_other_noise():
    inputs, targets = problem()
    model, optimizer = optimizer_of(dd.NoiseModel.isotropic(inputs, targets))
    step(model, optimizer, inputs * (1 - 1 / N) ** 0.5 - inputs.mean(0), targets)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_announced_rows_of_a_pool_must_vary_as_it_does(scale):
    """Without component ids the noise of a larger pool goes for other rows of the same law."""
    pool = torch.randn(500, D, generator=torch.Generator().manual_seed(2))
    inputs, targets = problem()
    model, optimizer = optimizer_of(dd.NoiseModel.fit(pool))
    batches = optimizer.track(list(torch.arange(N).split(40)) * 2)

    def train():
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(scale * inputs[rows]), targets[rows]).backward()
            optimizer.step()

    if scale == 1.0:
        train()
        return
    with pytest.raises(ValueError, match=r"fitted on 500 inputs.*vary [0-9.]+ times as much"):
        train()


def test_announced_samples_are_those_that_are_known_one_by_one():
    inputs, targets = problem()
    noise = dd.NoiseModel.isotropic(inputs, targets)
    model, optimizer = optimizer_of(noise)
    rows = torch.arange(40)
    with pytest.raises(ValueError, match=r"one by one .* none of the 40 announced"):
        step(model, optimizer, problem(1)[0], targets, rows)
    model, optimizer = optimizer_of(dataclasses.replace(noise, fingerprints=None))
    step(model, optimizer, problem(1)[0], targets, rows)
    # Some of them may have been augmented.
    model, optimizer = optimizer_of(noise)
    some = torch.where(torch.arange(N).unsqueeze(1) % 2 == 0, inputs, -inputs)
    step(model, optimizer, some, targets, rows)


def test_a_loaded_state_of_other_units_is_refused():
    inputs, targets = problem()
    model, optimizer = optimizer_of(dd.NoiseModel.isotropic(inputs))
    step(model, optimizer, inputs, targets)
    state = optimizer.state_dict()
    weights = model.state_dict()
    model, optimizer = optimizer_of(dd.NoiseModel.isotropic(inputs / 3))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="vary 3 times as much"):
        step(model, optimizer, inputs, targets)


def test_trials_are_held_against_their_noise_models():
    inputs, targets = problem()
    split = Split(inputs, targets, None, *problem(1))

    def train(scale):
        return dd.run_trials(
            lambda seed: split,
            lambda seed, _: optimizer_of(None)[0],
            {"dd": lambda parameters: dd.DecoupledDescent(parameters, lr=0.1)},
            seeds=[0],
            steps=2,
            noise=lambda found: dd.NoiseModel.isotropic(scale * found.train_inputs),
        )

    train(1.0)
    with pytest.raises(ValueError, match=r"vary 0\.33 times as much"):
        train(3.0)


# --- A state beside a noise model ------------------------------------------------------------


def state_of(inputs, targets):
    model, optimizer = optimizer_of(dd.NoiseModel.fit(inputs, targets))
    step(model, optimizer, inputs, targets)
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("late", [False, True])
def test_a_state_of_the_same_samples_in_another_order_is_refused(late):
    inputs, targets = problem()
    states = state_of(inputs, targets)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    noise = dd.NoiseModel.fit(inputs[order], targets[order])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = dd.DecoupledDescent(model.parameters(), lr=0.1)
    if not late:
        optimizer.attach(model, noise=noise)
    with pytest.raises(ValueError, match="stand in another order"):  # noqa: PT012
        optimizer.load_state_dict(states[1])
        optimizer.attach(model, noise=noise)
    with pytest.raises((ValueError, RuntimeError), match=r"another order|not attached"):
        step(model, optimizer, inputs[order], targets[order])


def test_a_state_beside_the_noise_model_of_other_samples_is_refused():
    inputs, targets = problem()
    states = state_of(inputs, targets)
    model, optimizer = optimizer_of(dd.NoiseModel.fit(*problem(seed=2)))
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    with pytest.raises(ValueError, match="the noise model was fitted on others"):
        step(model, optimizer, inputs, targets)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_state_of_shifted_samples_goes_on_beside_their_noise_model(shift):
    inputs, targets = problem()
    noise = dd.NoiseModel.fit(inputs, targets)
    model, optimizer = optimizer_of(noise)
    step(model, optimizer, inputs + shift, targets)
    states = model.state_dict(), optimizer.state_dict()
    again, loaded = optimizer_of(noise)
    again.load_state_dict(states[0])
    loaded.load_state_dict(states[1])
    step(again, loaded, inputs + shift, targets)
    step(model, optimizer, inputs + shift, targets)
    assert torch.equal(again[0].weight, model[0].weight)
