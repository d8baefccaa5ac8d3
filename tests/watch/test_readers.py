"""What reads the layer's inputs beside it, and rows that are one sample: both are told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd

N, D = 60, 8


class Branched(nn.Module):
    """A decoupled layer, a head, and something else that is given the inputs."""

    def __init__(self, other, *, joins=False, first=False):
        super().__init__()
        self.layer, self.other = nn.Linear(D, 4), other
        self.head = nn.Linear(4 + D if joins else 4, 3)
        self.joins, self.first = joins, first

    def forward(self, x):
        beside = self.other(x) if self.first else None
        hidden = torch.tanh(self.layer(x))
        scores = self.head(torch.cat([hidden, x], 1) if self.joins else hidden)
        if self.other is None:
            return scores
        return scores + (self.other(x) if beside is None else beside).sum(1, keepdim=True)


def data():
    torch.manual_seed(0)
    return torch.randn(N, D), torch.arange(N) % 3


def loss_of(model, inputs, labels):
    return F.cross_entropy(model(inputs), labels)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Branched(nn.LayerNorm(D)),
        lambda: Branched(nn.LayerNorm(D), first=True),
        lambda: Branched(nn.Sequential(nn.Flatten(), nn.LayerNorm(D))),
        lambda: Branched(None, joins=True),
    ],
    ids=["norm", "norm first", "nested", "joined to the output"],
)
def test_what_else_is_trained_on_the_inputs_is_refused(make):
    model, (inputs, labels) = make(), data()
    optimizer = dd.DecoupledDescent(model, lr=0.1, layer="layer", noise=dd.NoiseModel.fit(inputs))
    assert optimizer.layer is model.layer
    with pytest.raises(RuntimeError, match="trained on the inputs of the decoupled layer 'layer'"):
        loss_of(model, inputs, labels).backward()


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Branched(nn.Linear(D, 3).requires_grad_(False)),
        lambda: Branched(nn.ReLU()),
        lambda: Branched(None),
        lambda: Branched(nn.Linear(4, 4)),
    ],
    ids=["frozen", "without parameters", "none", "of other width, not run"],
)
def test_what_learns_nothing_of_the_inputs_is_let_be(make):
    model, (inputs, labels) = make(), data()
    if isinstance(model.other, nn.Linear) and model.other.in_features != D:
        model.forward = lambda x: model.head(model.layer(x))
    optimizer = dd.DecoupledDescent(model, lr=0.1, layer="layer", noise=dd.NoiseModel.fit(inputs))
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs, labels).backward()
        optimizer.step()
    # A copy of the model is nobody's.
    loss_of(copy.deepcopy(model), inputs, labels).backward()


class Pooled(nn.Module):
    """Rows are flattened out of sight, and pooled behind the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(D, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = torch.tanh(self.layer(x.flatten(0, 1)))
        return self.head(rows.view(len(x), -1, 4).mean(1))


@pytest.mark.filterwarnings("ignore:.*parameters that all samples share")
@pytest.mark.parametrize("curvature", ["probe", "stein"])
def test_rows_that_are_pooled_out_of_sight_are_told(curvature):
    torch.manual_seed(0)
    inputs, labels = torch.randn(N, 5, D), torch.arange(N) % 3
    rows = inputs.flatten(0, 1)
    noise = dd.NoiseModel.fit(rows, labels.repeat_interleave(5))
    model = Pooled()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, curvature=curvature, head=False)
    with pytest.warns(dd.StrainWarning, match="received 300 rows and the model returned 60"):
        loss_of(model, inputs, labels).backward()
    optimizer.step()
    found = optimizer.estimate([inputs], lambda x: model(x).mean(1).repeat_interleave(5))
    assert "Rows of one sample are taken for samples." in found.doubts


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize("first", [False, True])
def test_what_is_trained_on_the_inputs_from_later_on_is_refused(first):
    model, (inputs, labels) = Branched(nn.Linear(D, 3), first=first), data()
    model.other.requires_grad_(False)
    optimizer = dd.DecoupledDescent(model, lr=0.1, layer="layer", noise=dd.NoiseModel.fit(inputs))

    def step():
        optimizer.zero_grad()
        loss_of(model, inputs, labels).backward()
        optimizer.step()

    for _ in range(6):
        step()
    model.other.requires_grad_(True)
    with pytest.raises(RuntimeError, match="trained on the inputs of the decoupled layer 'layer'"):
        step()
