"""What a backward pass adds to the weight's gradient, seen where it is made, and tall products."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.gradient_check import scale_of_terms
from dd.correction.gradient_terms import ProjectedTerm, product_node
from dd.functional import all_finite
from dd.support.blocks import bin_groups, row_blocks, tall_product

N, D, K, C = 60, 30, 4, 3
ROUNDING = torch.finfo(torch.float64).eps


def make_problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    means = torch.randn(C, D, generator=g, dtype=torch.float64)
    return means[labels] + torch.randn(N, D, generator=g, dtype=torch.float64), labels


class Loop:
    """The same problem, network and start for every optimizer."""

    def __init__(self, bias=True, layer=nn.Linear, dtype=torch.float64, **settings):
        torch.manual_seed(0)
        inputs, self.labels = make_problem()
        self.inputs = inputs.to(dtype)
        self.model = nn.Sequential(layer(D, K, bias=bias), nn.Tanh(), nn.Linear(K, C)).to(dtype)
        noise = dd.NoiseModel.isotropic(self.inputs, self.labels)
        self.optimizer = dd.DecoupledDescent(self.model, lr=0.3, noise=noise, **settings)

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


class Shifted(nn.Linear):
    """Multiplies other inputs than those that it was given."""

    def forward(self, inputs):
        return F.linear(inputs + 1, self.weight, self.bias)


class Doubled(nn.Linear):
    """Computes XW by a weight that is not its parameter."""

    def forward(self, inputs):
        return F.linear(inputs, 2 * self.weight, self.bias)


def follow(loop, replaced):
    """Let a user's hook replace the gradient at the decoupled layer's output."""
    loop.model[0].register_forward_hook(
        lambda layer, args, output: output.register_hook(replaced) and None
    )


def clip(weight):
    weight.grad.mul_(0.37)


def unseen(monkeypatch):
    monkeypatch.setattr("dd.correction.training_forward.product_node", lambda output, weight: None)


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
    follow(doubled, lambda g: 2 * g)
    for _ in range(3):
        doubled.step()
        plain.step(lambda weight: [p.grad.mul_(2) for p in plain.model[0].parameters()])
    torch.testing.assert_close(doubled.weight, plain.weight)


@pytest.mark.parametrize("kind", ["masked", "first row for all"])
def test_a_gradient_that_a_hook_changed_by_rows_is_refused(kind):
    loop, changes = Loop(curvature="stein"), False
    mask = torch.arange(N).remainder(2).double().unsqueeze(1)

    def replaced(gradient):
        # The second lies at the same address.
        other = mask * gradient if kind == "masked" else gradient[:1].expand_as(gradient)
        return other if changes else gradient

    follow(loop, replaced)
    # An audited forward hands on another tensor, whose hooks come before the correction's.
    loop.step()
    loop.step()
    changes = True
    with pytest.raises(RuntimeError, match="not the one that the last backward"):
        loop.step()


def test_a_gradient_that_a_hook_changed_by_rows_is_followed_by_a_probe():
    """What the hook returns is what the correction sees, and what is differentiated once more."""
    loop, twin = Loop(), Loop()
    mask = torch.arange(N).remainder(2).double()
    follow(loop, lambda gradient: mask.unsqueeze(1) * gradient)
    loop.step()
    twin.optimizer.zero_grad()
    losses = F.cross_entropy(twin.model(twin.inputs), twin.labels, reduction="none")
    (mask * losses).mean().backward()
    twin.optimizer.step()
    torch.testing.assert_close(loop.weight, twin.weight)
    torch.testing.assert_close(loop.optimizer.shadow, twin.optimizer.shadow)


def test_a_second_backward_through_one_forward_is_counted():
    loop, once = Loop(curvature="stein"), Loop(curvature="stein")
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


def test_a_gradient_that_ends_at_the_output_is_no_part_of_the_weights():
    """It counts in G, but never reached W: nothing tells by which rows."""
    loop = Loop(curvature="stein")
    loop.step()
    loop.step()
    loop.optimizer.zero_grad()
    hidden = loop.model[0](loop.inputs)
    loss = F.cross_entropy(loop.model[1:](hidden), loop.labels)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, hidden)
    assert loop.terms() == [None]
    expected = Loop(curvature="stein")
    for _ in range(2):
        expected.step()
    expected.step()
    loop.optimizer.step()
    torch.testing.assert_close(loop.state(), expected.state())


COARSE = {"highest": torch.float32, "medium": torch.float32, "half": torch.bfloat16}


@pytest.fixture(params=COARSE)
def wide(request):
    """A layer of many inputs in a coarse precision, its terms, and its gradient."""
    before = torch.get_float32_matmul_precision()
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    g = torch.Generator().manual_seed(1)
    gradient = torch.randn(8, 1024, generator=g).to(COARSE[request.param])
    directions = torch.randn(3, 1024, generator=g)
    terms = [ProjectedTerm.of(gradient.clone(), directions)]
    yield gradient, terms, directions
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.9, 0.95, 1.0, 1.1])
def test_coarse_precision_hides_no_scale(wide, factor):
    gradient, terms, directions = wide
    found = scale_of_terms(gradient * factor, terms, directions)
    # Each number is rounded once, and the scale read off 3 times 8 sums.
    assert found == pytest.approx(factor, abs=4 * torch.finfo(gradient.dtype).eps)


@pytest.mark.parametrize("edit", ["rows", "columns", "clamped", "penalty"])
def test_coarse_precision_hides_no_edit(wide, edit):
    gradient, terms, directions = wide
    edited = gradient.clone()
    if edit == "rows":
        edited[::2] = 0
    elif edit == "columns":
        edited[:, ::2] = 0
    elif edit == "clamped":
        edited.clamp_(-0.3, 0.3)
    else:
        edited += torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2))
    with pytest.raises(RuntimeError, match="edited entry by entry"):
        scale_of_terms(edited, terms, directions)


def test_another_product_than_the_weights_is_no_term():
    layer = Doubled(D, K).double()
    assert product_node(layer(make_problem()[0]), layer.weight) is None


@pytest.mark.parametrize("patched", [False, True])
def test_a_layer_that_multiplies_other_inputs_is_refused(patched):
    loop = Loop(layer=nn.Linear if patched else Shifted)
    if patched:
        loop.model[0].forward = partial(Shifted.forward, loop.model[0])
    loop.backward()
    assert loop.terms() == [None]
    with pytest.raises(RuntimeError, match="not the one that the last backward"):
        loop.optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"curvature": "probe"}, {"curvature": "exact"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_are_seen_in_every_precision_and_under_every_estimator(dtype, settings):
    loop = Loop(dtype=dtype, **settings)
    for _ in range(4):
        loop.optimizer.zero_grad()
        loss = F.cross_entropy(loop.model(loop.inputs), loop.labels)
        loss.backward(create_graph=loop.optimizer.needs_graph)
        assert None not in loop.terms()
        loop.optimizer.step()


def test_a_half_precision_product_is_not_seen():
    loop = Loop(dtype=torch.float32)
    for _ in range(3):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(loop.model(loop.inputs), loop.labels)
        loss.backward()
        assert loop.terms() == [None]
        loop.optimizer.step()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch knows no grad_dtype")
def test_a_gradient_kept_in_half_precision_is_the_one_delivered():
    loop = Loop(dtype=torch.float32)
    loop.weight.grad_dtype = torch.bfloat16
    for _ in range(3):
        loop.step()


def test_infinite_numbers_are_named_even_where_they_were_edited_away():
    loop = Loop()
    loop.step()
    loop.backward(factor=torch.inf)
    for p in loop.model.parameters():
        p.grad.nan_to_num_(0, 0, 0)
    with pytest.raises(FloatingPointError, match="the output of '0'"):
        loop.optimizer.step()
    assert loop.terms() == []


@pytest.mark.parametrize("defers", [False, True])
def test_nothing_of_a_step_outlives_it(defers, monkeypatch):
    loop = Loop()
    if defers:
        monkeypatch.setattr("dd.correction.attachment.Attachment.stalls", True)
    for _ in range(3):
        loop.step()
    loop.backward()
    gone = weakref.ref(loop.optimizer._attachment.pending[0].gradient)
    assert loop.optimizer._attachment.verdicts.defers == defers
    loop.optimizer.step()
    assert gone() is None


@pytest.mark.parametrize("batch", [N, 20])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_shadows_of_another_precision_go_on(dtypes, batch):
    one, other = (Loop(dtype=dtype) for dtype in dtypes)
    one.step()
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    for rows in torch.arange(N).split(batch):
        other.optimizer.zero_grad()
        F.cross_entropy(other.model(other.inputs[rows]), other.labels[rows]).backward()
        other.optimizer.step()
    assert other.optimizer.shadow.dtype == dtypes[0]


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
