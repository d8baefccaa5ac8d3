"""The derivative of an optimizer's step, against finite differences of the step itself."""

import copy

import pytest
import torch
from torch import Tensor, nn, optim

from dd.rules.linearised import GRADIENT, PARAMETER, has_derivative, step_derivative

CASES = {
    "SGD": (optim.SGD, {}),
    "SGD momentum": (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (optim.Adam, {"weight_decay": 0.1}),
    "Adam amsgrad": (optim.Adam, {"amsgrad": True, "foreach": True}),
    "AdamW": (optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    "NAdam": (optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (optim.RAdam, {}),
    "Adamax": (optim.Adamax, {}),
    "Adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
    "Adadelta": (optim.Adadelta, {}),
    "RMSprop": (optim.RMSprop, {"centered": True, "momentum": 0.9}),
}
SIZE = 1e-7


def parts_of(optimizer, parameter):
    return {
        key: value
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


@pytest.mark.parametrize(("rule", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("steps", [0, 7])
def test_derivative_is_that_of_finite_differences(rule, settings, steps):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(3, 2, generator=generator, dtype=torch.float64)

    parameter = nn.Parameter(draw())
    optimizer = rule([parameter], lr=0.1, **settings)
    for _ in range(steps):
        parameter.grad = draw()
        optimizer.step()
    parameter.grad = draw()
    group = optimizer.param_groups[0]
    found = step_derivative(optimizer, group, parameter, parameter.grad)

    def stepped(source, moved):
        other = nn.Parameter(parameter.detach().clone())
        twin = rule([other], lr=0.1, **settings)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.grad = parameter.grad.clone()
        with torch.no_grad():
            {PARAMETER: other, GRADIENT: other.grad, **parts_of(twin, other)}[source].add_(moved)
        twin.step()
        return {PARAMETER: other.detach(), **parts_of(twin, other)}

    for source in [PARAMETER, GRADIENT, *parts_of(optimizer, parameter)]:
        ahead, behind = stepped(source, SIZE), stepped(source, -SIZE)
        for name, value in ahead.items():
            expected = (value - behind[name]) / (2 * SIZE)
            derivative = found[name].get(source, torch.zeros_like(expected))
            # Rounding of values of about one over the step, and the square of the step over the
            # smallest squared gradients, of about 1e-4.
            tolerance = 1e-7 + 1e-4 * expected.abs().max()
            assert (derivative - expected).abs().max() <= tolerance, (source, name)


def test_step_itself_is_left_alone():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    step_derivative(optimizer, optimizer.param_groups[0], parameter, parameter.grad)
    assert torch.equal(parameter.detach(), before[1])
    for key, value in before[0]["state"][0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], value)


def test_what_never_moved_has_no_infinite_derivative():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = optim.AdamW([parameter], lr=0.1)
    gradient = torch.zeros(2, 2)
    found = step_derivative(optimizer, optimizer.param_groups[0], parameter, gradient)
    assert all(v.isfinite().all() for parts in found.values() for v in parts.values())


def test_rules_without_a_derivative_are_known():
    parameter = nn.Parameter(torch.ones(2, 2))
    assert has_derivative(optim.AdamW([parameter]))
    assert not has_derivative(optim.Rprop([parameter]))
