"""What users' hooks may do in a recorded backward pass, and what it leaves behind."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn

import dd
from dd.curvature.custom import CurvatureWarning
from dd.curvature.handed_gradient import HandedGradient
from tests.curvature.test_recorded import K, finite_difference, forward_of, gradient_at, point


def scale_data_(gradient):
    gradient.data.mul_(2)


def assign_data(gradient):
    gradient.data = gradient.data * 2


def scale_(gradient):
    gradient *= 2


def scale_in_pieces(gradient):
    found = torch.empty_like(gradient)
    for index, given in enumerate(gradient):
        given *= 1.0
        found[index].copy_(given)
    return torch.stack(list(2 * found))


DOUBLE = {
    "as it is": lambda g: g * 2,
    "no grad": torch.no_grad()(lambda g: g * 2),
    "detached": lambda g: g.detach() * 2,
    "detached by function": lambda g: torch.detach(g) * 2,
    "detached in place": lambda g: g.clone().detach_() * 2,
    "data": scale_data_,
    "data of a copy": lambda g: g.clone().data.mul_(2),
    "data assigned": assign_data,
    "in place": scale_,
    "to a place": lambda g: torch.add(g, g, out=torch.empty_like(g)),
    "in place of a copy": lambda g: g.clone().copy_(2 * g),
    "transposed": lambda g: (g.mT * 2).mT,
    "in pieces": scale_in_pieces,
    "joined": lambda g: torch.cat([g[:, :1] * 2, 2 * g[:, 1:]], 1),
    "several": lambda g: torch._foreach_mul([g], 2)[0],
    "clipped": lambda g: g * (2 * g.abs().max(0).values.clamp_min(9) / 9),
}


def network(hook=None):
    torch.manual_seed(3)
    layer = nn.Linear(K, 4).double()

    def head(r):
        hidden = layer(r.tanh())
        if hook is not None:
            hidden.register_hook(hook)
        return hidden.tanh().square().sum()

    return head


def require_scaled(head, factor):
    leaf, forward, outgoing = forward_of(point())
    head(outgoing).backward()
    expected = finite_difference(network(), point(), forward.probe)
    torch.testing.assert_close(forward.product, factor * expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad, factor * gradient_at(network(), point()))


@pytest.mark.parametrize("name", DOUBLE)
def test_however_a_hook_doubles_a_gradient_its_derivative_doubles(name):
    plain = point().requires_grad_()
    network(DOUBLE[name])(plain * 1.0).backward()
    torch.testing.assert_close(plain.grad, 2 * gradient_at(network(), point()))
    require_scaled(network(DOUBLE[name]), 2)


@pytest.mark.parametrize(
    "replace",
    [
        lambda g: torch.from_numpy(g.numpy() * 2),
        lambda g: torch.ones(g.shape, dtype=g.dtype),
        lambda g: g.clone().requires_grad_().detach(),
    ],
)
def test_a_gradient_from_elsewhere_is_told(replace):
    _, _, outgoing = forward_of(point())
    with pytest.warns(CurvatureWarning, match="hook .* constant"):
        network(replace)(outgoing).backward()


def test_no_gradient_at_all_is_a_constant():
    require_scaled(network(lambda g: torch.zeros(g.shape, dtype=g.dtype)), 0)
    require_scaled(network(torch.zeros_like), 0)


class Mark:
    """Lives as long as a graph does."""


def test_hooks_may_keep_and_change_what_is_their_own():
    average, kept, total = torch.zeros(6, 4, dtype=torch.float64), [], 0.0
    other = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    mixed = torch.zeros_like(average)

    def hook(gradient):
        nonlocal total
        assert not torch.is_grad_enabled()
        assert not gradient.requires_grad
        assert gradient.grad_fn is None
        assert gradient.is_leaf
        average.mul_(0.9).add_(gradient, alpha=0.1)
        mixed[0] = gradient[0]
        mixed[1:] += gradient[1:]
        torch._foreach_add_([mixed], [gradient])
        torch.mul(gradient, 2, out=mixed)
        other.sub_(gradient)
        other.grad = gradient
        total = 0.9 * total + gradient
        kept.append((gradient, gradient.norm(), gradient[0], f"{gradient[0, 0]:.3f}"))

    places = []
    for _ in range(2):
        _, _, outgoing = forward_of(point())
        head = network(hook)
        loss = head(outgoing)
        mark = Mark()
        places.append(weakref.ref(mark))
        loss.grad_fn.metadata["mark"] = mark
        loss.backward()
        del loss, outgoing, head, mark
    gc.collect()
    assert [place() for place in places] == [None, None]
    gradient = kept[0][0]
    plain = gradient.as_subclass(Tensor)
    assert not average.requires_grad
    assert not mixed.requires_grad
    torch.testing.assert_close(average, 0.19 * plain)
    torch.testing.assert_close(mixed, 2 * plain)
    torch.testing.assert_close(other.detach(), 1 - 2 * plain)
    torch.testing.assert_close(total.as_subclass(Tensor), 1.9 * plain)
    # All that outlives the pass is an ordinary tensor of no graph.
    for found in (*kept[0][:3], total, other.grad):
        assert not found.requires_grad
        assert type(found * 2) is Tensor
        assert not (found * 2).requires_grad
        assert isinstance(found, HandedGradient)
        assert not found.is_live
    total.mul_(2)
    torch.testing.assert_close(total.as_subclass(Tensor), 3.8 * plain)
    (total * other).sum().backward()
    saved = io.BytesIO()
    torch.save(gradient, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(gradient), torch.load(saved, weights_only=True)):
        assert type(copied) is Tensor
        torch.testing.assert_close(copied, plain)


def test_what_a_hook_keeps_may_scale_later_forwards():
    kept = []
    _, _, outgoing = forward_of(point())
    network(kept.append)(outgoing).backward()
    _, forward, outgoing = forward_of(point())
    factor = kept[0].norm()
    (network()(outgoing) * factor).backward()
    expected = finite_difference(network(), point(), forward.probe)
    torch.testing.assert_close(forward.product, float(factor) * expected, rtol=1e-6, atol=1e-7)


def test_a_hook_sees_the_output_that_it_keeps_as_part_of_the_graph():
    def head(r):
        hidden = r.tanh()
        hidden.register_hook(lambda gradient: hidden.detach() * gradient)
        return hidden.sum()

    _, forward, outgoing = forward_of(point())
    head(outgoing).backward()
    expected = finite_difference(lambda r: r.tanh().sum(), point(), forward.probe)
    torch.testing.assert_close(forward.product, point().tanh() * expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_with_a_graph_of_their_own_hooks_get_gradients_of_it():
    found = []
    _, _, outgoing = forward_of(point())
    network(lambda g: found.append((type(g), g.requires_grad)))(outgoing).backward(
        create_graph=True
    )
    assert found[0][1]
    assert found[0][0] is not HandedGradient


def test_retained_gradients_are_what_the_last_hook_leaves():
    _, _, outgoing = forward_of(point())
    hidden = outgoing.tanh()
    hidden.retain_grad()
    hidden.register_hook(lambda gradient: gradient * 3)
    hidden.sum().backward()
    torch.testing.assert_close(hidden.grad, 3 * torch.ones(6, K, dtype=torch.float64))


def test_legacy_hooks_of_modules_get_the_gradients_of_torch():
    calls = []
    for leads in (
        lambda values: values.requires_grad_() * 1.0,
        lambda values: forward_of(values)[2],
    ):
        module = nn.Tanh()
        module.register_backward_hook(lambda _, given, out: calls.append((given, out)) and None)
        module(leads(point())).square().sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(*[[*(g.as_subclass(Tensor) for g in (*a, *b))] for a, b in calls])


def trained(hooked, count, steps=3):
    """Train with a hook on something of the model; return how often it was called a step."""
    calls = []
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 20), torch.arange(60) % 2
    model = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2))
    hooked(model, lambda *_: calls.append(1))
    optimizer = count(model, inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return len(calls) / steps


def on_output(model, note, position=0):
    model[position].register_forward_hook(lambda _, __, output: output.register_hook(note) and None)


PLACES = {
    "output of the layer": on_output,
    "output of the head": lambda model, note: on_output(model, note, 2),
    "layer": lambda model, note: model[0].register_full_backward_hook(note),
    "activation": lambda model, note: model[1].register_full_backward_hook(note),
    "layer, legacy": lambda model, note: model[0].register_backward_hook(note),
    "activation, legacy": lambda model, note: model[1].register_backward_hook(note),
    "weight of the layer": lambda model, note: model[0].weight.register_hook(note),
    "weight of the head": lambda model, note: model[2].weight.register_hook(note),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Using a non-full backward hook:FutureWarning",
    "ignore::dd.StrainWarning",
)
@pytest.mark.parametrize("head", [False, True])
def test_every_hook_of_a_model_is_called_once_a_step(name, head):
    def attached(model, inputs):
        noise = dd.NoiseModel.isotropic(inputs)
        return dd.DecoupledDescent(model, lr=0.1, noise=noise, head=head)

    assert trained(PLACES[name], attached) == 1


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Using a non-full backward hook:FutureWarning",
    "ignore::dd.StrainWarning",
)
def test_hooks_that_come_after_attaching_are_called_once_a_step(name):
    calls = []
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 20), torch.arange(60) % 2
    model = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2))
    noise = dd.NoiseModel.isotropic(inputs)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    PLACES[name](model, lambda *_: calls.append(1))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert len(calls) == 3
