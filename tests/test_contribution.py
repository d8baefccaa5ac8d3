"""What a backward pass adds to the weight's gradient, seen where it is made, and tall products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.blocks import bin_groups, row_blocks, tall_product
from dd.contribution import product_node
from dd.functional import all_finite

N, D, K, C = 60, 30, 4, 3
ROUNDING = torch.finfo(torch.float64).eps


def make_problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    means = torch.randn(C, D, generator=g, dtype=torch.float64)
    return means[labels] + torch.randn(N, D, generator=g, dtype=torch.float64), labels


class Loop:
    """The same problem, network and start for every optimizer."""

    def __init__(self, bias=True, layer=nn.Linear):
        torch.manual_seed(0)
        self.inputs, self.labels = make_problem()
        self.model = nn.Sequential(layer(D, K, bias=bias), nn.Tanh(), nn.Linear(K, C)).double()
        noise = dd.NoiseModel.isotropic(self.inputs, self.labels)
        self.optimizer = dd.DecoupledDescent(self.model, lr=0.3, noise=noise)

    @property
    def weight(self):
        return self.model[0].weight

    def backward(self, parts=1, factor=1.0):
        self.optimizer.zero_grad()
        for rows in torch.arange(N).chunk(parts):
            scores = self.model(self.inputs[rows] if parts > 1 else self.inputs)
            loss = F.cross_entropy(scores, self.labels[rows], reduction="sum") / N
            (factor * loss).backward()

    def terms(self):
        return [c.contribution for c in self.optimizer._attachment.pending]

    def step(self, edit=lambda weight: None, **how):
        self.backward(**how)
        edit(self.weight)
        self.optimizer.step()

    def state(self):
        return [*(p.detach() for p in self.model.parameters()), self.optimizer.shadow]


class Doubled(nn.Linear):
    """Computes XW by a weight that is not its parameter."""

    def forward(self, inputs):
        return F.linear(inputs, 2 * self.weight, self.bias)


def clip(weight):
    weight.grad.mul_(0.37)


def unseen(monkeypatch):
    monkeypatch.setattr("dd.training_forward.product_node", lambda output, weight: None)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_term_is_the_product_of_inputs_and_gradients(bias, parts):
    loop = Loop(bias)
    for _ in range(2):
        loop.step()
    loop.backward(parts)
    attachment = loop.optimizer._attachment
    directions = attachment.samples.directions.double()
    gradient = torch.cat([c.gradient for c in attachment.pending])
    expected = directions @ loop.inputs.mT @ gradient
    found = sum(term.along for term in loop.terms())
    # Sums of N D products.
    bound = N * D * ROUNDING * float(loop.inputs.norm() * directions.norm() * gradient.norm())
    assert float((found - expected).abs().max()) <= bound
    sizes = [
        (loop.inputs[rows].mT @ c.gradient).norm(dim=0)
        for rows, c in zip(torch.arange(N).chunk(parts), attachment.pending, strict=True)
    ]
    torch.testing.assert_close([term.size for term in loop.terms()], sizes)


@pytest.mark.parametrize("edit", [lambda weight: None, clip], ids=["plain", "clipped"])
@pytest.mark.parametrize("factor", [1.0, 2.0**100])
@pytest.mark.parametrize("parts", [1, 3])
def test_seen_or_not_a_step_is_the_same(parts, factor, edit, monkeypatch):
    paths = []
    for seen in (True, False):
        if not seen:
            unseen(monkeypatch)
        loop = Loop()

        def unscaled(weight, loop=loop):
            for p in loop.model.parameters():
                p.grad /= factor
            edit(weight)

        for _ in range(5):
            loop.step(unscaled, parts=parts, factor=factor)
            assert loop.optimizer.state[loop.weight]["shadow_step"] > 0
        loop.backward(parts)
        assert all((term is not None) == seen for term in loop.terms())
        paths.append(loop.state())
    # The scale is read off N D products, in each of five steps.
    torch.testing.assert_close(*paths, rtol=0, atol=5 * N * D * ROUNDING)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("strength", [1e-6, 1e-2])
def test_a_penalty_in_the_loss_is_refused(seen, strength, monkeypatch):
    if not seen:
        unseen(monkeypatch)
    loop = Loop()
    loop.step()
    loop.optimizer.zero_grad()
    loss = F.cross_entropy(loop.model(loop.inputs), loop.labels)
    (loss + strength * loop.weight.square().sum()).backward()
    before = [value.clone() for value in loop.state()]
    with pytest.raises(RuntimeError, match="weight_decay="):
        loop.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.state(), strict=True))


def test_one_number_of_a_gradient_is_looked_at():
    loop = Loop()
    loop.step()

    def nudge(weight):
        weight.grad[1, 2] *= 1 + 1e-6

    with pytest.raises(RuntimeError, match="edited entry by entry"):
        loop.step(nudge)


def test_a_gradient_that_a_hook_replaced_is_compared_with_the_one_kept():
    """A multiple is followed, anything else refused: the shadows follow what R received."""
    doubled, plain = Loop(), Loop()
    doubled.model[0].register_forward_hook(
        lambda layer, args, output: output.register_hook(lambda g: 2 * g) and None
    )
    for _ in range(3):
        doubled.step()
        plain.step(lambda weight: [p.grad.mul_(2) for p in plain.model[0].parameters()])
    torch.testing.assert_close(doubled.weight, plain.weight)
    masked = Loop()
    mask = torch.ones(N, 1, dtype=torch.float64)
    masked.model[0].register_forward_hook(
        lambda layer, args, output: output.register_hook(lambda g: mask * g) and None
    )
    # An audited forward hands on another tensor, whose hooks come before the correction's.
    masked.step()
    masked.step()
    mask[::2] = 0
    with pytest.raises(RuntimeError, match="not the one that the last backward"):
        masked.step()


def test_a_second_backward_through_one_forward_is_counted():
    loop, once = Loop(), Loop()
    loop.step()
    once.step()
    loop.optimizer.zero_grad()
    loss = F.cross_entropy(loop.model(loop.inputs), loop.labels)
    loss.backward(retain_graph=True)
    loss.backward()
    assert loop.terms() == [None]
    loop.optimizer.step()
    once.step(factor=2.0)
    torch.testing.assert_close(loop.state(), once.state())


def test_another_product_than_the_weights_is_no_term():
    loop = Loop(layer=Doubled)
    assert product_node(loop.model[0](loop.inputs), loop.weight) is None
    loop.optimizer.drop_forward()
    loop.backward()
    assert loop.terms() == [None]
    with pytest.raises(RuntimeError, match="nor a multiple"):
        loop.step(lambda weight: weight.grad.add_(1.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 255, 1536, 1537, 5000])
def test_tall_product(rows, threads):
    g = torch.Generator().manual_seed(rows)
    left, right = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (5, 7))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = tall_product(left, right)
        blocks = row_blocks(rows, 2**10, left.device)
    finally:
        torch.set_num_threads(before)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        expected += torch.outer(a, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=max(rows, 1) * ROUNDING * 20)
    covered = [i for rows_ in blocks for i in range(rows_.start, rows_.stop)]
    assert covered == list(range(rows))


def test_bins_move_together_only_where_launches_cost():
    assert bin_groups(3, torch.device("cpu")) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert bin_groups(3, torch.device("cuda")) == [slice(0, 3)]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found(bad):
    good = torch.ones(3, 4)
    for dtype in (torch.float16, torch.float32, torch.complex64):
        one = good.to(dtype, copy=True)
        one[1, 2] = bad
        assert all_finite(good, one, torch.stack([one, -one])).tolist() == [True, False, False]
    # Half precision sums beyond its range.
    assert bool(all_finite(torch.full((2000,), 6e4, dtype=torch.float16)))
