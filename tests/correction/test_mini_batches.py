"""Mini-batches: every sample meets its own shadow, and absent ones decay as if present."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.noise.model import NoiseModel
from tests import reference

N, D, K, C = 30, 9, 3, 3


def make_problem(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % C
    means = torch.randn(C, D, generator=g).double()
    return means[labels] + torch.randn(n, D, generator=g).double(), labels


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()


def make_noise(inputs, bins=2, per_sample=False):
    """Two bins given by hand, so that nothing depends on how a spectrum is fitted."""
    fitted = NoiseModel.isotropic(inputs)
    mass = 0.5 + torch.arange(len(inputs)).double() / len(inputs)
    return NoiseModel(
        torch.tensor([2.0, 0.3][:bins]).double(),
        torch.tensor([4, D - 4] if bins == 2 else [D]),
        relative_mass=mass / mass.mean() if per_sample else None,
        fingerprints=fitted.fingerprints,
        fitted_on=len(inputs),
    )


def shuffled(m, epochs, seed=1, n=N, drop_last=False):
    g = torch.Generator().manual_seed(seed)
    batches = [b for _ in range(epochs) for b in torch.randperm(n, generator=g).split(m)]
    return [b for b in batches if len(b) == m] if drop_last else batches


def drawn(m, steps, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(N, (m,), generator=g) for _ in range(steps)]


def head_of(model):
    first, last = model[0], model[2]
    parts = (first.bias, last.weight, last.bias)
    return reference.Head(*(p.detach().clone() for p in parts))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def run(model, optimizer, inputs, labels, batches, settings=(), *, told=False):
    losses = []
    for step, batch in enumerate(batches):
        if settings:
            optimizer.param_groups[0].update(settings[step % len(settings)])
        if told:
            optimizer.batch(batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


PLANS = {
    "shuffled": shuffled(4, 4),
    "last batch dropped": shuffled(7, 5, drop_last=True),
    "with replacement": drawn(5, 25),
    "single samples": shuffled(1, 1),
    "one batch again and again": [torch.arange(6)] * 12 + [torch.arange(N)] * 2,
    "all samples in other orders": shuffled(N, 6),
}

RULES = {
    "plain": [{"lr": 0.3}],
    "momentum": [{"lr": 0.2, "momentum": 0.8}],
    "dampening": [{"lr": 0.3, "momentum": 0.7, "dampening": 0.3}],
    "nesterov": [{"lr": 0.2, "momentum": 0.8, "nesterov": True}],
    "weight decay": [{"lr": 0.2, "momentum": 0.5, "weight_decay": 0.3}],
    "decoupled decay": [{"lr": 0.3, "weight_decay": 0.3, "decoupled_weight_decay": True}],
    "decoupled, momentum": [
        {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.3, "decoupled_weight_decay": True}
    ],
    "schedule": [{"lr": 0.4}, {"lr": 0.1}, {"lr": 0.0}],
    "cycled momentum": [{"lr": 0.2, "momentum": 0.5}, {"lr": 0.1, "momentum": 0.8}],
    "ascent": [{"lr": 0.05, "maximize": True, "momentum": 0.5}],
}


def compare_with_the_twin(plan, rule, *, bins=2, per_sample=False, told=False):
    inputs, labels = make_problem()
    model, noise = make_model(), make_noise(inputs, bins, per_sample)
    weight, head = model[0].weight.detach().T.clone(), head_of(model)
    optimizer = dd.DecoupledDescent(model, noise=noise, curvature="exact", **rule[0])
    losses = run(model, optimizer, inputs, labels, plan, rule, told=told)
    optimizer.state_dict()  # brings every sample up to date
    expected = reference.mini_batch_descent(
        inputs,
        labels,
        weight,
        head,
        torch.tanh,
        [batch.tolist() for batch in plan],
        [reference.Rule(**rule[step % len(rule)]) for step in range(len(plan))],
        noise.eigenvalues.tolist(),
        noise.multiplicities.tolist(),
        noise.relative_mass,
    )
    torch.testing.assert_close(losses, [loss for *_, loss in expected], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[0].weight.detach().T, expected[-1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizer.shadow, expected[-1][1], rtol=1e-8, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("rule", RULES)
def test_lazy_decay_is_the_eager_rule(rule):
    compare_with_the_twin(PLANS["shuffled"], RULES[rule])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
# One batch again and again is training on few samples.
@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("plan", PLANS)
def test_every_way_of_drawing_batches(plan, momentum):
    compare_with_the_twin(PLANS[plan], [{"lr": 0.2, "momentum": momentum}], per_sample=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_batches_told_by_their_indices():
    compare_with_the_twin(PLANS["shuffled"], RULES["momentum"], told=True)
