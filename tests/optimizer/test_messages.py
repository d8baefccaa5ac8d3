"""Errors and warnings that name the cause, and remedies that work."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd

N, D = 120, 12

QUIET = """
import warnings
warnings.simplefilter("error")
import torch
import dd
inputs, labels = torch.randn(200, 8), torch.arange(200) % 2
model = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.GELU(), torch.nn.Linear(2, 2))
optimizer = dd.DecoupledDescent(model, lr=0.1)
torch.nn.functional.cross_entropy(model(inputs), labels).backward()
optimizer.step()
"""


def problem():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, D, generator=generator)
    return inputs, torch.arange(N) % 3


def network(*before, activation=nn.GELU, behind=()):
    torch.manual_seed(0)
    return nn.Sequential(*before, nn.Linear(D, 8), activation(), *behind, nn.Linear(8, 3))


def step(model, optimizer, inputs, labels, loss=F.cross_entropy):
    optimizer.zero_grad()
    loss(model(inputs), labels).backward(create_graph=optimizer.needs_graph)
    optimizer.step()


def test_the_first_probe_of_a_process_is_silent():
    subprocess.run([sys.executable, "-c", QUIET], check=True)  # noqa: S603 - our own words


# What diverges has large shadows first.
@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("known", [False, True])
def test_what_diverged_is_blamed_on_its_rate(activation, momentum, known):
    inputs, labels = problem()
    noise = dd.NoiseModel.isotropic(inputs, labels if known else None)
    model = network(activation=activation)
    # Weights whose products are in range while the squares behind the curvature are not.
    optimizer = dd.DecoupledDescent(model, lr=50.0, momentum=momentum, noise=noise)

    def train():
        for _ in range(200):
            step(model, optimizer, inputs, labels)

    with pytest.raises(FloatingPointError, match=r"finite.*the learning rate is too large") as e:
        train()
    assert "half precision" not in str(e.value)


@pytest.mark.parametrize("half", [False, True])
def test_half_precision_is_named_where_there_is_some(half):
    inputs, labels = problem()
    model = network(behind=[nn.Linear(8, 8)])
    noise = dd.NoiseModel.isotropic(inputs, labels)
    optimizer = dd.DecoupledDescent(model, noise=noise, curvature="stein")
    step(model, optimizer, inputs, labels)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    capture = optimizer._attachment.pending[0]
    capture._observed = torch.full_like(capture._observed, torch.inf)
    if half:
        model[2].half()
    with pytest.raises(FloatingPointError, match=r"learning rate is too large .halve it;") as e:
        optimizer.step()
    assert ("half precision" in str(e.value)) == half


class GaussianNoise(nn.Module):
    """A layer of the user's own."""

    def forward(self, inputs):
        return inputs + torch.randn_like(inputs) if self.training else inputs


CHANGING = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(D, affine=False),
    "Dropout": lambda: nn.Dropout(0.2),
    "GaussianNoise": GaussianNoise,
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_the_inputs_is_named(name):
    inputs, labels = problem()
    inputs = 3 * inputs + 1
    message = rf"Found before layer '1': '0' \({name}\).*eval mode"
    model = network(CHANGING[name]())
    optimizer = dd.DecoupledDescent(model, noise=dd.NoiseModel.isotropic(inputs))
    with pytest.raises(ValueError, match=message):
        step(model, optimizer, inputs[:40], labels[:40])
    # Without a noise model the first batch is all samples.
    model = network(CHANGING[name]())
    optimizer = dd.DecoupledDescent(model)
    step(model, optimizer, inputs, labels)
    with pytest.raises(RuntimeError, match=message):
        step(model, optimizer, inputs[:40], labels[:40])
    model = network(CHANGING[name]())
    noise = dd.NoiseModel.isotropic(inputs)
    noise = dd.NoiseModel(noise.eigenvalues, noise.multiplicities)
    optimizer = dd.DecoupledDescent(model, noise=noise)
    for rows in [torch.arange(40), torch.arange(20, 60)]:
        optimizer.batch(rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, optimizer, inputs[rows], labels[rows])
    found = [w for w in caught if w.category is dd.AugmentationWarning]
    assert len(found) == 1
    assert re.search(message, str(found[0].message))


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_the_inputs_does_not_in_eval_mode(name):
    inputs, labels = problem()
    model = network(CHANGING[name](), behind=[nn.Dropout(0.1)])
    model[0].eval()
    optimizer = dd.DecoupledDescent(model, noise=dd.NoiseModel.isotropic(model[0](inputs)))
    for rows in torch.arange(N).split(40):
        step(model, optimizer, inputs[rows], labels[rows])
    with pytest.raises(RuntimeError, match="not among") as e:
        step(model, optimizer, inputs[:40] + 1, labels[:40])
    assert "Found before" not in str(e.value)


@pytest.mark.parametrize("curvature", ["probe", "probe_create_graph", "exact"])
@pytest.mark.parametrize("loss", [nn.MultiMarginLoss(), nn.MultiMarginLoss(p=2)])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:.* was trained by another optimizer")
def test_a_margin_loss_is_told_what_works(loss, curvature):
    inputs, labels = problem()

    def squared_hinge(scores, labels):
        return (1 - scores.gather(1, labels[:, None]) + scores).clamp_min(0).square().mean()

    model = network()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature=curvature)
    with pytest.raises(NotImplementedError, match=r"multi_margin_loss.*components") as e:
        step(model, optimizer, inputs, labels, loss)
    assert "create_graph" not in str(e.value)
    optimizer.drop_forward()
    step(model, optimizer, inputs, labels, squared_hinge)
    optimizer.detach()
    noise = dd.NoiseModel.isotropic(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, curvature="stein")
    step(model, optimizer, inputs, labels, loss)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("curvature", ["probe", "probe_create_graph"])
def test_without_any_second_derivative_none_is_promised(curvature):
    inputs, labels = problem()
    model = network()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature=curvature)
    lengths = torch.full((N,), 3), torch.ones(N).long()

    def ctc(scores, labels):
        steps = scores.repeat(3, 1, 1).log_softmax(2)
        return F.ctc_loss(steps, 1 + labels[:, None] % 2, *lengths)

    with pytest.raises(NotImplementedError, match=r"ctc_loss, .*has none.*components") as e:
        step(model, optimizer, inputs, labels, ctc)
    assert 'curvature="probe_create_graph"' not in str(e.value)
    optimizer.drop_forward()
