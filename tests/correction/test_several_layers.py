"""Several linear layers on the same inputs are one layer of all their columns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd

N, D, K, C = 40, 9, 3, 2


class Wide(nn.Module):
    """A hidden layer, and a linear skip past it."""

    def __init__(self, *, skip_first=False, nested=False):
        super().__init__()
        self.layer, self.head = nn.Linear(D, K), nn.Linear(K, C)
        skip = nn.Linear(D, C)
        self.skip = nn.Sequential(nn.Flatten(), skip) if nested else skip
        self.skip_first = skip_first

    def forward(self, x):
        before = self.skip(x) if self.skip_first else None
        scores = self.head(torch.tanh(self.layer(x)))
        return scores + (self.skip(x) if before is None else before)


class Joined(nn.Module):
    """The same of a single layer."""

    def __init__(self, wide):
        super().__init__()
        skip = wide.skip[1] if isinstance(wide.skip, nn.Sequential) else wide.skip
        self.layer, self.head = nn.Linear(D, K + C).double(), copy.deepcopy(wide.head)
        with torch.no_grad():
            self.layer.weight.copy_(torch.cat([wide.layer.weight, skip.weight]))
            self.layer.bias.copy_(torch.cat([wide.layer.bias, skip.bias]))

    def forward(self, x):
        hidden, beside = self.layer(x).split([K, C], 1)
        return self.head(torch.tanh(hidden)) + beside


def data():
    torch.manual_seed(0)
    inputs, labels = torch.randn(N, D).double(), torch.arange(N) % C
    inputs[:, 0] += 2.0 * labels
    return inputs, labels


def train(model, optimizer, inputs, labels, size):
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        for batch in torch.randperm(N, generator=g).split(size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.parametrize("layer", [None, ["layer", "skip"]], ids=["found", "named"])
@pytest.mark.parametrize("curvature", ["probe", "stein"])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("size", [N, 15])
def test_two_layers_are_one_of_all_their_columns(layer, curvature, skip_first, size):
    inputs, labels = data()
    noise = dd.NoiseModel.fit(inputs, labels)
    torch.manual_seed(0)
    model = Wide(skip_first=skip_first).double()
    joined = Joined(model)
    settings = {"lr": 0.3, "momentum": 0.5, "noise": noise, "curvature": curvature, "head": False}
    optimizer = dd.DecoupledDescent(model, layer=layer, **settings)
    expected = dd.DecoupledDescent(joined, **settings)
    losses = [
        train(*pair, inputs, labels, size) for pair in ((model, optimizer), (joined, expected))
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.shadow, expected.shadow, rtol=1e-9, atol=1e-12)
    assert optimizer.shadow.shape[-1] == K + C
    outputs = [o.predict([inputs[:20], inputs[20:]]) for o in (optimizer, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_a_head_that_nobody_asked_for_gives_way():
    inputs, labels = data()
    model = Wide(nested=True).double()
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=dd.NoiseModel.fit(inputs, labels))
    train(model, optimizer, inputs, labels, N)
    assert optimizer.shadow.shape[-1] == K + C
    again = copy.deepcopy(optimizer)
    assert torch.equal(again.shadow, optimizer.shadow)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize("settings", [{"lr": "auto"}, {"damping": 0.5}])
def test_what_follows_one_layer_alone_is_refused(settings):
    inputs, labels = data()
    noise = dd.NoiseModel.fit(inputs, labels, bins=1, separate_means=False)
    given = {"lr": 0.3, "noise": noise, "head": False, **settings}
    model = Wide().double()
    optimizer = dd.DecoupledDescent(model, **given)
    assert optimizer.layer is model.layer
    with pytest.raises(RuntimeError, match=r"decouple both: layer=\['layer', 'skip'\]"):
        model(inputs)
    model = Wide().double()
    optimizer = dd.DecoupledDescent(model, layer=["layer", "skip"], **given)
    assert optimizer.layer is model.layer
    with pytest.raises(ValueError, match="several layers on the same inputs are not followed yet"):
        model(inputs)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_a_model_that_does_not_run_in_eval_mode_is_told_what_to_name():
    inputs, labels = data()

    class Moody(Wide):
        def forward(self, x):
            if not self.training:
                raise NotImplementedError
            return super().forward(x)

    model = Moody().double()
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=False)
    assert optimizer.layer is model.layer
    with pytest.raises(RuntimeError, match=r"decouple both: layer=\['layer', 'skip'\]"):
        model(inputs)
    assert model.training
    assert model.layer.training


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_layers_that_cannot_be_one_are_refused():
    inputs, labels = data()
    noise = dd.NoiseModel.fit(inputs, labels)
    model = Wide().double()
    with pytest.raises(ValueError, match=r"take \[3, 9\] of them"):
        dd.DecoupledDescent(model, layer=["layer", "head"], noise=noise)
    with pytest.raises(ValueError, match="each once"):
        dd.DecoupledDescent(model, layer=["layer", "layer"], noise=noise)
    rest = [p for p in model.parameters() if p is not model.skip.weight]
    groups = [{"params": rest}, {"params": [model.skip.weight], "lr": 0.1}]
    optimizer = dd.DecoupledDescent(groups, lr=0.3)
    optimizer.attach(model, noise=noise)
    with pytest.raises(ValueError, match="must be in one parameter group"):
        model(inputs)
    model = Wide().double()
    model.forward = lambda x: model.head(torch.tanh(model.layer(x))) + model.skip(x + 1)
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, layer=["layer", "skip"])
    assert optimizer.layer is model.layer
    with pytest.raises(RuntimeError, match="'skip' did not run, once, on the inputs"):
        model(inputs)
