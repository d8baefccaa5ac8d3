"""Backward passes in two parts deliver what those of plain torch deliver, and call hooks once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

import dd
from tests.curvature.test_recorded import K, finite_difference, forward_of, point


class Net:
    """A head with parameters, some of them also behind R, and all that happens in it.

    Args:
        values: R, shape (m, k).
        recorded: whether its backward pass is recorded.
    """

    def __init__(self, values: Tensor, *, recorded: bool) -> None:
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(K, 4).double(), nn.Linear(4, 1).double()
        self.unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
        self.calls = []
        if recorded:
            self.leaf, self.forward, self.output = forward_of(values)
        else:
            self.leaf = values.clone().requires_grad_()
            self.output = self.leaf * 1.0
        self.loss = self.head(self.output)

    def head(self, r: Tensor) -> Tensor:
        self.side = self.last.weight * 2
        self.hidden = self.first(r.tanh())
        self.hidden.register_hook(self.note("hidden"))
        self.activated = F.silu(self.hidden)
        if r is self.output:
            # The parameter behind R comes in once more.
            r.register_hook(self.note("output"))
            self.first.weight.register_hook(self.note("weight"))
        scores = (self.activated @ self.side.mT).squeeze() + self.activated.square().sum(1)
        return scores.square().sum() + (self.leaf**3).sum()

    def note(self, name: str):
        return lambda gradient: self.calls.append((name, gradient.tolist()))

    def place(self, name: str):
        if name.startswith("edge of "):
            return get_gradient_edge(getattr(self, name.removeprefix("edge of ")))
        parameters = {"weight": self.first.weight, "last": self.last.weight}
        return parameters[name] if name in parameters else getattr(self, name)


ENDS = [
    ["leaf"],
    ["weight", "last", "leaf"],
    ["hidden"],
    ["hidden", "leaf"],
    ["hidden", "activated", "output", "weight", "leaf"],
    ["output"],
    ["side", "last", "leaf"],
    ["leaf", "leaf", "hidden", "hidden"],
    ["edge of hidden", "edge of output", "leaf"],
]


def both():
    return Net(point(), recorded=False), Net(point(), recorded=True)


def require_alike(found, expected):
    """The order of the additions that make a gradient is torch's own business."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert [type(item) for item in found] == [type(item) for item in expected]
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor | float):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
        else:
            assert one == other


def in_order(calls):
    # Parameters come when all places in front of R have come.
    return sorted(calls, key=lambda call: call[0])


def require_product(net):
    silent = Net(point(), recorded=False)
    expected = finite_difference(silent.head, point(), net.forward.probe)
    torch.testing.assert_close(net.forward.product, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", ENDS, ids="-".join)
def test_gradients_at_any_places_are_those_of_torch(names):
    plain, recorded = both()
    expected, found = (
        torch.autograd.grad(net.loss, [net.place(name) for name in names])
        for net in (plain, recorded)
    )
    assert not any(gradient.requires_grad for gradient in found)
    require_alike(found, expected)
    require_alike(in_order(recorded.calls), in_order(plain.calls))
    assert all(p.grad is None for p in (recorded.leaf, recorded.first.weight))
    reaches = any(name in {"leaf", "weight"} for name in names)
    assert len(recorded.forward.products) == reaches
    if reaches:
        require_product(recorded)


@pytest.mark.parametrize("names", ENDS, ids="-".join)
def test_gradients_accumulate_at_any_places_as_in_torch(names):
    plain, recorded = both()
    for net in (plain, recorded):
        net.loss.backward(inputs=[net.place(name) for name in names], retain_graph=True)
        net.loss.backward(inputs=[net.place(name) for name in names])
        for name in ("leaf", "weight", "last"):
            net.calls.append((name, net.place(name).grad))
        for name in names:
            place = net.place(name)
            net.calls.append((name, place.grad if isinstance(place, Tensor) else None))
    require_alike(in_order(recorded.calls), in_order(plain.calls))
    assert all(not g.requires_grad for _, g in recorded.calls if isinstance(g, Tensor))


def test_whole_passes_are_those_of_torch():
    plain, recorded = both()
    for net in (plain, recorded):
        net.hidden.retain_grad()
        net.hidden.retain_grad()
        net.output.retain_grad()
        net.loss.backward()
        names = ("leaf", "weight", "last", "hidden", "output")
        net.calls.extend((name, net.place(name).grad) for name in names)
    require_alike(in_order(recorded.calls), in_order(plain.calls))
    require_product(recorded)


def test_what_is_asked_beside_the_places_is_done_as_in_torch():
    plain, recorded = both()
    for net in (plain, recorded):
        named = {"unused": net.unused, "leaf": net.leaf}
        with pytest.raises(RuntimeError, match="index 0 appears to not have been used"):
            torch.autograd.grad(net.loss, named, retain_graph=True)
        found = torch.autograd.grad(net.loss, named, retain_graph=True, allow_unused=True)
        assert found["unused"] is None
        found = torch.autograd.grad(net.loss, named, retain_graph=True, materialize_grads=True)
        assert not found["unused"].any()
        with pytest.raises(RuntimeError, match="cannot be empty"):
            torch.autograd.grad(net.loss, [])
        with pytest.raises(RuntimeError, match="cannot be empty"):
            net.loss.backward(inputs=[])
        with pytest.raises(RuntimeError, match=r"requires_grad|require grad"):
            net.loss.backward(inputs=[net.output.detach()])
        net.loss.backward(torch.tensor(2.0).double())
        torch.testing.assert_close(net.leaf.grad, 2 * found["leaf"])
        with pytest.raises(RuntimeError, match="second time"):
            net.loss.backward()


def test_parts_of_a_batch_of_gradients_count_for_no_step():
    leaf, forward, outgoing = forward_of(point())
    rows = torch.eye(6, dtype=torch.float64)
    (found,) = torch.autograd.grad(outgoing.tanh().sum(1), leaf, rows, is_grads_batched=True)
    torch.testing.assert_close(found.sum(0), 1 - leaf.detach().tanh() ** 2)
    assert forward.products == []


def trained(way, *, head, looks):
    torch.manual_seed(0)
    inputs, labels = torch.randn(300, 20), torch.arange(300) % 2
    inputs[:, 0] += 2 * labels - 1
    model = nn.Sequential(nn.Linear(20, 3), nn.Tanh(), nn.Linear(3, 2))
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, head=head)
    parameters = list(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        features = model[1](model[0](inputs))
        loss = F.cross_entropy(model[2](features), labels)
        if looks:
            # The gradient ends before the decoupled layer.
            torch.autograd.grad(loss, features, retain_graph=True)
        if way == "grad":
            for parameter, found in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = found
        elif way == "inputs":
            loss.backward(inputs=[features, *parameters])
        else:
            loss.backward()
        optimizer.step()
    assert (optimizer._attachment.shared is not None) == (head is not False)
    return [optimizer.shadow, *parameters]


@pytest.mark.parametrize("head", ["auto", True, False])
@pytest.mark.parametrize("looks", [False, True], ids=["", "looks"])
@pytest.mark.parametrize("way", ["grad", "inputs"])
def test_training_by_other_ways_of_differentiating_is_that_by_backward(way, looks, head):
    expected = trained("backward", head=head, looks=False)
    for one, other in zip(trained(way, head=head, looks=looks), expected, strict=True):
        assert torch.equal(one, other)
