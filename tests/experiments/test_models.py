"""The two-layer network: shape, initialisation, activations."""

import pytest
import torch
from torch import nn

from dd.experiments.models import ACTIVATIONS, two_layer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_layers_and_output():
    model = two_layer(6, 4, 3)
    hidden, activation, head = model
    assert isinstance(hidden, nn.Linear)
    assert isinstance(activation, nn.GELU)
    assert hidden.weight.shape == (4, 6)
    assert head.weight.shape == (3, 4)
    assert model(torch.zeros(5, 6)).shape == (5, 3)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_weights_have_the_documented_moments(scale):
    d, k, classes = 500, 400, 300
    hidden, _, head = two_layer(d, k, classes, hidden_scale=scale, generator=seeded(0))
    for weight, variance in ((hidden.weight, scale**2 / d), (head.weight, 1 / k)):
        count = weight.numel()
        unit = weight.detach() / variance**0.5
        # Standard deviations: of the mean 1/√N, of the second moment √2/√N, of the fourth √96/√N.
        assert abs(float(unit.mean())) < 5 / count**0.5
        assert abs(float(unit.square().mean()) - 1) < 5 * (2 / count) ** 0.5
        assert abs(float(unit.pow(4).mean()) - 3) < 5 * (96 / count) ** 0.5
    assert not hidden.bias.any()
    assert not head.bias.any()


def test_weights_depend_on_the_generator_alone():
    def weights(seed):
        return torch.cat(
            [p.flatten() for p in two_layer(6, 4, 3, generator=seeded(seed)).parameters()]
        )

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device():
    expected = two_layer(6, 4, 3, generator=seeded(1))[0].weight
    with torch.device("meta"):
        drawn = two_layer(6, 4, 3, generator=seeded(1))[0].weight
    assert torch.equal(expected, drawn)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("softplus", lambda x: torch.log(1 + torch.exp(x))),
        ("tanh", torch.tanh),
        ("tanh_squared", lambda x: torch.tanh(x) ** 2),
    ],
)
def test_activations(name, function):
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(two_layer(2, 2, 2, activation=name)[1](x), function(x))


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == {"gelu", "relu", "silu", "softplus", "tanh", "tanh_squared"}


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of gelu, relu, .*tanh_squared, got 'mish'"):
        two_layer(2, 2, 2, activation="mish")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dimension": 0}, "dimension must be a positive integer, got 0"),
        ({"width": 2.0}, "width must be a positive integer, got 2.0"),
        ({"num_outputs": True}, "num_outputs must be a positive integer, got True"),
        (
            {"hidden_scale": -1.0},
            "hidden_scale must be a number, finite and not negative, got -1.0",
        ),
        ({"hidden_scale": float("inf")}, "hidden_scale must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        two_layer(**{"dimension": 2, "width": 2, "num_outputs": 2, **arguments})
