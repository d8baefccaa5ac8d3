"""``lr="auto"``: the family of a step, its cost, and what it does not go with."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dd
from dd.curvature.estimators import Probe, Stein
from dd.rules.line_search import extra_probes, product_cache
from dd.rules.line_search import step as line_step
from dd.rules.line_search.moving_tensors import Maps
from dd.rules.line_search.product_cache import tensor_checksum
from dd.rules.line_search.search import NO_MOVE, LineSearch, Point
from dd.watch.audit import Audit
from tests.closures import closure_of
from tests.reference import (
    Head,
    LinePoint,
    LineState,
    line_descent,
    line_loss,
    line_moved,
    line_rows,
    line_sample,
    sample_loss,
    stein_of,
)

N, D, K, C = 45, 24, 4, 3

create_graph_warns = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def make_problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    scales = torch.linspace(0.3, 1.7, D).double()
    means = torch.randn(C, D, generator=g, dtype=torch.float64)
    inputs = means[labels] + scales * torch.randn(N, D, generator=g, dtype=torch.float64)
    return inputs.to(dtype), labels


def make_model(between=(), dtype=torch.float64, seed=0, bias=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(D, K, bias=bias), *between, nn.Tanh(), nn.Linear(K, C, bias=bias)]
    return nn.Sequential(*layers).to(dtype)


def make_noise(inputs, labels, bins=1, separate=False):
    return dd.NoiseModel.fit(inputs, labels, bins=bins, per_sample=False, separate_means=separate)


class Forced:
    """Goes through given points, one a step; looks at the family with a function of its own."""

    def __init__(self, points, *, look=None):
        self.points, self.look = list(points), look

    def choose(self, family, memory):
        memory["steps"] = memory.get("steps", 0.0) + 1
        if self.look is not None:
            self.look(family)
        return self.points.pop(0)


class Drawn:
    """Goes to a point drawn from the number of the step."""

    def choose(self, family, memory):
        memory["step"] = memory.get("step", 0.0) + 1
        point = drawn(int(memory["step"]))
        memory["loss"], derivative = family.evaluate(point)
        memory["derivative"] = float(derivative.norm())
        return point


def drawn(seed):
    g = torch.Generator().manual_seed(seed)
    low = torch.tensor([0.8, 0.0, -0.4, -0.2, 0.0]).double()
    high = torch.tensor([1.0, 0.4, 0.4, 0.4, 0.4]).double()
    return Point.of(low + (high - low) * torch.rand(5, generator=g, dtype=torch.float64))


def gradient_step(rate):
    return Point(1.0, rate, 0.0, 0.0, rate)


def attached(model, noise, policy=None, **settings):
    optimizer = dd.DecoupledDescent(model, lr="auto", noise=noise, **settings)
    if policy is not None:
        optimizer._policy = policy
    return optimizer


def numeric(model, rate, noise, *, curvature="probe", **settings):
    return dd.DecoupledDescent(model, lr=rate, noise=noise, curvature=curvature, **settings)


def run(model, optimizer, inputs, labels, steps):
    closure = closure_of(model, optimizer, inputs, labels)
    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def everything(model, optimizer):
    """Copies of all tensors of a model and its optimizer, by name."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for number, (_, state) in enumerate(sorted(optimizer.state_dict()["state"].items())):
        for key, value in state.items():
            found[f"{number}.{key}"] = copy.deepcopy(value)
    return found


def discard_probes(monkeypatch):
    """Make the further probes, and do without their estimates."""

    def refined(*args):
        extra_probes.refined(*args)
        return lambda own: own

    monkeypatch.setattr(line_step, "refined", refined)


def require_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0)), name
        else:
            assert value == other[name], name


# --- The slow twin ---------------------------------------------------------------------------


class Twin:
    """The explicit state beside a model of two layers, its descent and its curvature."""

    def __init__(self, model, noise, inputs, labels, *, head):
        self.inputs, self.labels = inputs, labels
        self.values, self.counts = noise.eigenvalues.tolist(), noise.multiplicities.tolist()
        directions = noise.mean_directions
        self.means = inputs.new_zeros(D, 0) if directions is None else directions.double()
        self.along = self.means.shape[1]
        width = K * (self.along + 1) + C * (K + 1) if head else 0
        theta = Head(*(p.detach().clone() for p in (model[0].bias, *model[2].parameters())))
        self.state = LineState(
            model[0].weight.detach().T.clone(),
            inputs.new_zeros(len(self.values), N, K),
            theta,
            inputs.new_zeros(N, width),
        )

    def stein(self):
        rows, gradients = [], []
        for i, (x, label) in enumerate(zip(self.inputs, self.labels.tolist(), strict=True)):
            r, _, shift, _ = line_sample(x, i, self.state, torch.tanh, self.means)
            rows.append(r)
            arguments = (r, self.state.head, label, torch.tanh, shift)
            gradients.append(torch.func.grad(sample_loss)(*arguments) / N)
        return stein_of(torch.stack(rows), torch.stack(gradients), self.labels, 1e-4)

    def look(self, curvature):
        problem = (self.inputs, self.labels, self.state, torch.tanh, self.values, self.counts)
        self.descent, self.curvature = line_descent(*problem, self.means, curvature)

    def at(self, vector):
        point = LinePoint(*vector.tolist())
        return line_moved(self.state, self.descent, self.curvature, point, self.along)

    def loss(self, vector):
        return line_loss(self.inputs, self.labels, self.at(vector), torch.tanh, self.means)

    def gram(self):
        """R, S, RP and SP⁺ are what the first four coordinates add, one at a time."""
        units = torch.eye(5).double()[:4]
        rows = [line_rows(self.inputs, self.at(unit), self.means).flatten() for unit in units]
        return torch.stack([torch.stack([x @ y for y in rows]) for x in rows]) / (N * K)


def norm_of(head):
    return sum(float(part.square().sum()) for part in head) ** 0.5


def require_family(family, twin):
    """Loss to rounding; derivative to that of central differences, h² + eps/h with h = 1e-5."""
    assert family.loss == pytest.approx(twin.loss(NO_MOVE.vector), rel=1e-12)
    torch.testing.assert_close(family.gram, twin.gram(), rtol=1e-9, atol=1e-15)
    sizes = norm_of(twin.state.head), norm_of(twin.descent.head)
    assert family.head_sizes == pytest.approx(sizes, rel=1e-10)
    assert family.evaluate(NO_MOVE)[0] == pytest.approx(family.loss, rel=1e-12)
    vector = drawn(99).vector
    loss, derivative = family.evaluate(Point.of(vector))
    assert loss == pytest.approx(twin.loss(vector), rel=1e-12)
    for j, step in enumerate(1e-5 * torch.eye(len(vector)).double()):
        slope = (twin.loss(vector + step) - twin.loss(vector - step)) / 2e-5
        assert float(derivative[j]) == pytest.approx(slope, rel=1e-7, abs=1e-9)


def require_state(model, optimizer, twin):
    """Model, shadows and the product that is kept against the explicit state."""

    def close(one, other):
        torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-12)

    weight, state = model[0].weight, twin.state
    close(weight, state.weight.T)
    close(optimizer.shadow, state.shadow)
    close(optimizer.state[weight]["shadow_product"], twin.inputs @ state.weight)
    for parameter, expected in zip(
        (model[0].bias, *model[2].parameters()), state.head, strict=True
    ):
        close(parameter, expected)
    if not state.shared.shape[1]:
        return
    omega = state.shared[:, : K * (twin.along + 1)].reshape(N, K, -1)
    head = state.shared[:, K * (twin.along + 1) :].reshape(N, C, -1)
    close(optimizer.state[weight]["signal_shadow"], omega[..., :-1])
    close(optimizer.state[model[0].bias]["shadow"], omega[..., -1])
    close(optimizer.state[model[2].weight]["shadow"], head[..., :-1])
    close(optimizer.state[model[2].bias]["shadow"], head[..., -1])


@create_graph_warns
@pytest.mark.parametrize("curvature", ["stein", "probe", "exact"])
@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("bins", [1, 5])
def test_family_and_accepted_states_are_the_slow_twins(bins, head, curvature, monkeypatch):
    inputs, labels = make_problem()
    noise = make_noise(inputs, labels, bins, separate=head)
    model, points = make_model(), [drawn(step) for step in range(3)]
    policy = Forced(points)
    optimizer = attached(model, noise, policy, curvature=curvature, head=head)
    twin = Twin(model, noise, inputs, labels, head=head)
    # A search probes every unit, so that nothing of the probe's chance is left.
    own = twin.stein if curvature == "stein" else lambda: None

    def look(family):
        twin.look(own())
        require_family(family, twin)

    policy.look = look
    closure = closure_of(model, optimizer, inputs, labels)
    for point in points:
        expected = line_loss(inputs, labels, twin.state, torch.tanh, twin.means)
        assert float(optimizer.step(closure).detach()) == pytest.approx(expected, rel=1e-12)
        twin.state = twin.at(point.vector)
        require_state(model, optimizer, twin)
        assert optimizer.param_groups[0]["lr"] == point.step


@pytest.mark.parametrize(
    "curvature", ["indefinite", "one unit", "singular", "none", "tiny", "least"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_the_curvature_and_its_inverse_of_unit_norm(curvature, dtype):
    turned = torch.linalg.qr(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 0]]).to(dtype))[0]
    matrix, inverse = {
        "indefinite": ([1.0, -0.5, 0.2], [1.0, 2.0, 5.0]),
        "one unit": ([-0.1], [1.0]),
        "singular": ([0.0, 2.0, 0.01], [1 / 0.06, 0.5, 1 / 0.06]),
        "none": ([0.0], [0.0]),
        "tiny": ([1e-11, 1e-11, -1e-11], [1.0, 1.0, 1.0]),
        "least": ([1e-45], [1.0]),
    }[curvature]
    if len(matrix) == 1:
        turned = torch.ones(1, 1, dtype=dtype)
    expected = []
    for values in (matrix, inverse):
        values = torch.tensor(values, dtype=dtype)
        size = values.norm() if values.any() else 1.0
        expected.append((turned * (values / size)) @ turned.mT)
    atol = 2e-5 if dtype == torch.float32 else 1e-9
    maps = Maps.of((turned * torch.tensor(matrix, dtype=dtype)) @ turned.mT)
    for one, other in zip((maps.drift, maps.newton), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_the_curvature_is_probed_unless_steins_is_asked_for():
    """Component ids or not."""
    inputs, labels = make_problem()
    noise = make_noise(inputs, labels)
    for lr, settings, expected in (
        ("auto", {}, Probe),
        (0.1, {}, Probe),
        (0.1, {"curvature": "stein"}, Stein),
        ("auto", {"curvature": "stein"}, Stein),
    ):
        optimizer = dd.DecoupledDescent(make_model(), lr=lr, noise=noise, **settings)
        assert type(optimizer._attachment.estimator) is expected


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("curvature", ["stein", "probe"])
def test_a_gradient_step_is_that_of_the_numeric_rate(head, bias, curvature, monkeypatch):
    discard_probes(monkeypatch)
    inputs, labels = make_problem()
    noise = make_noise(inputs, labels, 4, separate=head)
    settings = {"head": head, "curvature": curvature}
    model, twin = make_model(bias=bias), make_model(bias=bias)
    optimizer = attached(model, noise, Forced([gradient_step(0.3)] * 8), **settings)
    losses = run(model, optimizer, inputs, labels, 8)
    other = numeric(twin, 0.3, noise, **settings)
    assert losses == pytest.approx(run(twin, other, inputs, labels, 8), rel=1e-11)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.shadow, other.shadow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_the_search_lowers_the_loss_at_every_step(head):
    inputs, labels = make_problem(torch.float32)
    model = make_model(dtype=torch.float32)
    optimizer = attached(model, make_noise(inputs, labels, separate=head), head=head)
    optimizer.state[model[0].weight]["shadow_memory"] = {"informed": 1.0}
    losses = run(model, optimizer, inputs, labels, 5)
    assert losses[-1] < 0.5 * losses[0]
    assert all(later <= before + 1e-5 for before, later in itertools.pairwise(losses))


def test_a_tracked_loader_of_one_batch():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, None, Drawn())
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    loader = optimizer.track(torch.utils.data.DataLoader(dataset, batch_size=N))

    def closure():
        optimizer.zero_grad()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    twin = make_model()
    assert losses == pytest.approx(run(twin, attached(twin, None, Drawn()), inputs, labels, 4))


def test_noise_that_the_first_step_fits():
    inputs, labels = make_problem()
    model = make_model()
    losses = run(model, attached(model, None), inputs, labels, 4)
    assert losses[-1] < losses[0]


def test_probes_of_every_unit_give_the_exact_curvature(monkeypatch):
    inputs, labels = make_problem()
    model, found = make_model(), []

    def refined(*args):
        better = extra_probes.refined(*args)
        found.append(better(torch.zeros(K, K, dtype=torch.float64)))
        return better

    monkeypatch.setattr(line_step, "refined", refined)
    optimizer = attached(model, make_noise(inputs, labels), Forced([NO_MOVE]), curvature="probe")
    torch.manual_seed(5)
    closure = closure_of(model, optimizer, inputs, labels)
    optimizer.step(closure)
    after, gradients = torch.rand(1), [p.grad.clone() for p in model.parameters()]
    twin = make_model()
    rows = (inputs @ twin[0].weight.T).detach().requires_grad_()

    def loss_of(r):
        return F.cross_entropy(twin[2](torch.tanh(r + twin[0].bias)), labels)

    (gradient,) = torch.autograd.grad(loss_of(rows), rows, create_graph=True)
    exact = torch.stack(
        [torch.autograd.grad(gradient[:, j].sum(), rows, retain_graph=True)[0] for j in range(K)]
    ).sum(1)
    torch.testing.assert_close(found[0], exact)
    # Random numbers and gradients are those of one call.
    torch.manual_seed(5)
    closure()
    assert torch.equal(after, torch.rand(1))
    for one, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_of_many_units_the_probes_are_averaged(monkeypatch):
    inputs, labels = make_problem()
    model, own = make_model(), 7 * torch.eye(K, dtype=torch.float64)
    monkeypatch.setattr(extra_probes, "MOST_UNITS", K - 1)
    solved, found = [], []

    def refined(attachment, *args):
        solve = attachment.estimator.solve
        with monkeypatch.context() as patch:
            patch.setattr(
                attachment.estimator, "solve", lambda m: solved.append(solve(m)) or solved[-1]
            )
            better = extra_probes.refined(attachment, *args)
        found.append(better(own))
        return better

    monkeypatch.setattr(line_step, "refined", refined)
    optimizer = attached(model, make_noise(inputs, labels), Forced([NO_MOVE]), curvature="probe")
    optimizer.step(closure_of(model, optimizer, inputs, labels))
    assert len(solved) == K - 1
    assert float(torch.stack(solved).std(0).min()) > 0
    torch.testing.assert_close(found[0], torch.stack([own, *solved]).mean(0))


# --- Cost ------------------------------------------------------------------------------------


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products of X with a matrix of k columns."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"mm", "addmm", "bmm", "baddbmm"}:
            shapes = {tuple(x.shape[-2:]) for x in args if isinstance(x, torch.Tensor)}
            if shapes & {(N, D), (D, N)} and shapes & {(N, K), (K, N), (D, K), (K, D)}:
                self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["stein", "probe"])
@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_two_products_a_step(head, curvature, monkeypatch):
    inputs, labels = make_problem()
    model = make_model()
    noise = make_noise(inputs, labels, separate=head)
    optimizer = attached(model, noise, head=head, curvature=curvature)
    closure, calls, counts = closure_of(model, optimizer, inputs, labels), [], []

    def counted():
        calls.append(1)
        return closure()

    monkeypatch.setattr(product_cache, "_REFRESH_AFTER", 5)
    for _ in range(8):
        calls.clear()
        with ProductCounter() as counter:
            optimizer.step(counted)
        counts.append(counter.count)
        assert len(calls) > 1
    # The first step has no XW to start from, and every fifth computes it anew.
    assert counts == [3, 2, 2, 2, 2, 3, 2, 2]


@pytest.mark.parametrize("change", ["inputs", "data", "half"])
def test_a_product_that_does_not_fit_is_computed(change):
    inputs, labels = make_problem()
    dtype = torch.bfloat16 if change == "half" else torch.float64
    model, noise = make_model(dtype=dtype), make_noise(inputs, labels)
    inputs = inputs.to(dtype)
    optimizer = attached(model, noise, Forced([gradient_step(0.1)] * 4))
    run(model, optimizer, inputs, labels, 2)
    if change == "data":
        # In the tolerance of the check that the weight is the optimizer's.
        model[0].weight.data[0, 0] += 1e-9
    with ProductCounter() as counter:
        run(model, optimizer, inputs.clone() if change == "inputs" else inputs, labels, 1)
    assert counter.count == (2 if change == "inputs" else 3)


def test_a_mark_sees_every_change():
    weight = torch.randn(5, 7)
    changed = weight.clone()
    assert torch.equal(tensor_checksum(weight), tensor_checksum(changed))
    assert torch.equal(tensor_checksum(weight.T.contiguous().T), tensor_checksum(weight))
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    assert not torch.equal(tensor_checksum(weight), tensor_checksum(changed))
    assert not torch.equal(tensor_checksum(weight), tensor_checksum(weight.roll(1)))


# --- What lies between, and what surrounds ------------------------------------------------------


def test_dropout_masks_are_one_for_all_calls_of_a_step(monkeypatch):
    discard_probes(monkeypatch)
    inputs, labels = make_problem()
    model = make_model([nn.Dropout(0.5)])
    found = []

    def look(family):
        found.append([family.loss, *(family.evaluate(NO_MOVE)[0] for _ in range(2))])
        torch.rand(3)

    optimizer = attached(
        model, make_noise(inputs, labels), Forced([gradient_step(0.1)] * 3, look=look)
    )
    torch.manual_seed(3)
    run(model, optimizer, inputs, labels, 3)
    after = torch.rand(1)
    for first, *others in found:
        assert others == pytest.approx([first] * 2, rel=1e-12)
    twin = make_model([nn.Dropout(0.5)])
    torch.manual_seed(3)
    run(twin, numeric(twin, 0.1, make_noise(inputs, labels)), inputs, labels, 3)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-10, atol=1e-12)


def test_batch_norm_counts_the_first_call_and_holds_the_statistics_of_the_weights(monkeypatch):
    discard_probes(monkeypatch)
    inputs, labels = make_problem()
    model, twin = make_model([nn.BatchNorm1d(K)]), make_model([nn.BatchNorm1d(K, momentum=1.0)])
    points = [gradient_step(0.1)] * 3
    policy = Forced(points, look=lambda family: family.evaluate(drawn(1)))
    run(model, attached(model, make_noise(inputs, labels), policy), inputs, labels, 3)
    optimizer = numeric(twin, 0.1, make_noise(inputs, labels))
    run(twin, optimizer, inputs, labels, 3)
    # Statistics are of the forward before a step; one more is of the weights that it left.
    twin(inputs)
    assert int(model[1].num_batches_tracked) == 3
    assert model[1].momentum == 0.1
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [None, "auto"])
def test_a_closure_that_differentiates_another_loss_than_it_returns_is_refused(stop):
    inputs, labels = make_problem()
    for factor, penalty in ((3.0, 0.0), (1.0, 2.0)):
        model, hidden = make_model(), []
        model[1].register_forward_hook(lambda *args, hidden=hidden: hidden.append(args[2]))
        noise = make_noise(inputs, labels)
        optimizer = dd.DecoupledDescent(model, lr="auto", stop=stop, noise=noise, head=False)
        before = [p.detach().clone() for p in model.parameters()]

        def closure(model=model, optimizer=optimizer, hidden=hidden, f=factor, p=penalty):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            (f * loss + p * hidden[-1].square().mean()).backward()
            return loss

        with pytest.raises(RuntimeError, match="must return the loss that it differentiates"):
            optimizer.step(closure)
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.NoSignalWarning")
@pytest.mark.parametrize("kind", ["a tiny head", "no signal", "far targets", "half precision"])
def test_closures_of_small_slopes_are_believed(kind):
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 10, generator=g)
    labels = (inputs[:, 0] > 0).long() if kind != "no signal" else torch.arange(2000) % 2
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 2))
        if kind == "a tiny head":
            with torch.no_grad():
                model[2].weight.mul_(1e-3)
                model[2].bias.zero_()
        noise = dd.NoiseModel.fit(inputs, labels)
        optimizer = dd.DecoupledDescent(model, lr="auto", noise=noise, head=False)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            scores = model(inputs)
            loss = F.cross_entropy(scores, labels)
            if kind == "far targets":
                loss = (scores[:, 0] - labels - 1000).square().mean()
            elif kind == "half precision":
                loss = F.cross_entropy(scores.bfloat16(), labels)
            loss.backward()
            return loss

        assert math.isfinite(float(optimizer.step(closure).detach()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_left_as_the_first_call_left_them(set_to_none):
    inputs, labels = make_problem()
    model = make_model()
    gradients = []

    def closure():
        optimizer.zero_grad(set_to_none)
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return loss

    optimizer = attached(model, make_noise(inputs, labels))
    for _ in range(2):
        gradients.clear()
        optimizer.step(closure)
        for parameter, first in zip(model.parameters(), gradients[0], strict=True):
            assert torch.equal(parameter.grad, first)
        assert not optimizer._attachment.pending
        assert optimizer._attachment.trial is None
        assert "forward" not in vars(model[0])


def test_a_loss_that_is_not_finite_counts_as_infinite():
    inputs, labels = make_problem()
    model = make_model()
    model[1] = nn.Softplus()

    def look(family):
        for point in (Point(*[1e300] * 5), Point(float("nan"), 0.0, 0.0, 0.0, 0.0)):
            loss, derivative = family.evaluate(point)
            assert loss == float("inf")
            assert not derivative.any()

    policy = Forced([gradient_step(0.1)] * 2, look=look)
    losses = run(model, attached(model, make_noise(inputs, labels), policy), inputs, labels, 2)
    assert losses[1] < losses[0]


def test_frozen_and_unused_parameters_stay():
    inputs, labels = make_problem()
    model = make_model()
    model.unused = nn.Linear(2, 2).double()
    model.unused.forward = lambda value: value
    model[2].weight.requires_grad_(False)
    before = [model[2].weight.clone(), model.unused.weight.clone()]
    run(model, attached(model, make_noise(inputs, labels), Drawn()), inputs, labels, 3)
    assert torch.equal(before[0], model[2].weight)
    assert torch.equal(before[1], model.unused.weight)


@pytest.mark.parametrize("point", ["first", "trial", "first step"])
def test_an_exception_leaves_everything_as_it_was(point):
    inputs, labels = make_problem()
    model, twin = make_model([nn.BatchNorm1d(K)]), make_model([nn.BatchNorm1d(K)])
    noise = make_noise(inputs, labels)
    done = 0 if point == "first step" else 2
    pairs = [(m, attached(m, noise, Drawn())) for m in (model, twin)]
    for m, optimizer in pairs:
        run(m, optimizer, inputs, labels, done)
    optimizer = pairs[0][1]
    closure, calls = closure_of(model, optimizer, inputs, labels), []

    def failing():
        calls.append(1)
        loss = closure()
        if len(calls) == (1 if point == "first" else 2):
            raise KeyboardInterrupt
        return loss

    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    after = everything(model, optimizer)
    # As a forward without a step does, the call has moved the running statistics.
    for name in [name for name in before if name.startswith("1.") and name in model.state_dict()]:
        if name not in dict(model.named_parameters()):
            before.pop(name), after.pop(name)
    require_equal(before, after)
    assert not optimizer._attachment.pending
    assert "forward" not in vars(model[0])
    expected = run(*pairs[1], inputs, labels, 3)
    assert run(*pairs[0], inputs, labels, 3) == expected


def test_wrong_components_are_noticed_behind_a_product_that_is_kept(monkeypatch):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels), Drawn(), curvature="stein")
    audited, measure = [], Audit._measure
    monkeypatch.setattr(
        Audit, "_measure", lambda self, loss: audited.append(measure(self, loss)) or audited[-1]
    )
    run(model, optimizer, inputs, labels, 5)
    # Forwards 1, 2 and 5.
    assert len(audited) == 3


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_autocast(head):
    """The closure's own precision; half of it moves the loss by some units of 2^-8."""
    inputs, labels = make_problem(torch.float32)
    results = []
    for enabled in (True, False):
        model = make_model(dtype=torch.float32)
        noise = make_noise(inputs, labels, separate=head)
        look = []
        policy = Forced(map(drawn, range(3)))
        policy.look = lambda family, look=look: look.append(family.evaluate(drawn(7)))
        optimizer = attached(model, noise, policy, head=head)

        def closure(model=model, optimizer=optimizer, enabled=enabled):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
        results.append([*losses, *(loss for loss, _ in look)])
    assert results[0] == pytest.approx(results[1], rel=8 * 2**-8)


# --- State -----------------------------------------------------------------------------------


def loaded(pair, build):
    model, optimizer = build(1)
    model.load_state_dict(copy.deepcopy(pair[0].state_dict()))
    optimizer.load_state_dict(copy.deepcopy(pair[1].state_dict()))
    return model, optimizer


def loaded_in_other_order(pair, build):
    model, optimizer = build(1)
    optimizer.load_state_dict(pair[1].state_dict())
    model.load_state_dict(pair[0].state_dict())
    return model, optimizer


WAYS = {
    "state": loaded,
    "state, model last": loaded_in_other_order,
    "deepcopy": lambda pair, build: copy.deepcopy(pair),
    "pickle": lambda pair, build: pickle.loads(pickle.dumps(pair)),  # noqa: S301
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(Drawn, torch.float32), (Drawn, torch.float64), (LineSearch, torch.float32)],
)
def test_every_way_to_go_on_is_the_uninterrupted_run_bit_for_bit(way, policy, dtype):
    inputs, labels = make_problem(dtype)

    def build(seed=0):
        model = make_model(dtype=dtype, seed=seed)
        noise = make_noise(inputs, labels, 3, separate=True)
        return model, attached(model, noise, policy(), head=True)

    uninterrupted, origin = build(), build()
    for pair in (uninterrupted, origin):
        run(*pair, inputs, labels, 2)
    twin = WAYS[way](origin, build)
    expected = run(*uninterrupted, inputs, labels, 3)
    for pair in (twin, origin):
        with ProductCounter() as counter:
            assert run(*pair, inputs, labels, 3) == expected
        assert counter.count == 6
        require_equal(everything(*pair), everything(*uninterrupted))


def test_a_checkpoint_is_plain_data_and_detaching_leaves_none_of_it(tmp_path):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels), Drawn())
    run(model, optimizer, inputs, labels, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state)
    run(model, optimizer, inputs, labels, 1)
    optimizer.detach()
    assert not any(optimizer.state.values())


def test_schedules_have_no_effect_and_see_the_step_taken():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels), Forced([gradient_step(0.25)] * 3))
    assert optimizer.param_groups[0]["lr"] == 0.0
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    for _ in range(3):
        run(model, optimizer, inputs, labels, 1)
        assert optimizer.param_groups[0]["lr"] == 0.25
        scheduler.step()


# --- Compiled models -------------------------------------------------------------------------


class Framed(nn.Sequential):
    """What follows the decoupled layer has a frame of its own, which is compiled."""

    def head(self, preactivation):
        return self[2](self[1](preactivation) * 2)

    def forward(self, inputs):
        preactivation = self[0](inputs)
        return self.head(preactivation)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("way", "curvature"),
    [("model", "stein"), ("in place", "probe"), ("layer", "stein"), ("closure", "probe")],
)
def test_compiled_models_do_as_eager_ones(way, curvature):
    inputs, labels = make_problem()
    noise = make_noise(inputs, labels)
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = forward = Framed(*make_model())
        optimizer = attached(model, noise, Drawn(), curvature=curvature)
        if compiles and way == "model":
            forward = torch.compile(model, backend="aot_eager")
        elif compiles and way == "in place":
            model.compile(backend="aot_eager")
        elif compiles and way == "layer":
            model[0].compile(backend="aot_eager")
        closure = closure_of(forward, optimizer, inputs, labels)
        if compiles and way == "closure":
            closure = torch.compile(closure, backend="aot_eager")
        losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
        memory = optimizer.state[model[0].weight]["shadow_memory"].values()
        results.append([*losses, *memory, *model[0].weight.detach().flatten().tolist()])
    torch._dynamo.reset()
    assert results[1] == pytest.approx(results[0], rel=1e-9, abs=1e-12)


def test_the_layer_is_no_part_of_one_graph():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"DecoupledDescent looks.*fullgraph"):
        run(compiled, optimizer, inputs, labels, 1)
    torch._dynamo.reset()


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"decoupled_weight_decay": True},
        {"maximize": True},
        {"differentiable": True},
        {"damping": 0.5},
    ],
    ids=str,
)
def test_settings_that_are_not_plain_gradient_steps(settings):
    with pytest.raises(ValueError, match=r'lr="auto".*got (momentum|.*=(True|0\.[15]))|damping=1'):
        dd.DecoupledDescent(make_model(), lr="auto", **settings)


def test_settings_that_change_on_the_way():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels))
    run(model, optimizer, inputs, labels, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r'lr="auto" chooses.*got weight_decay=0.1'):
        run(model, optimizer, inputs, labels, 1)


def test_unknown_rates():
    with pytest.raises(ValueError, match=r"lr must be a number or \"auto\", got 'best'"):
        dd.DecoupledDescent(make_model(), lr="best")
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    with pytest.raises(ValueError, match=r"one step for all parameters.*lr=0.1.*freeze"):
        dd.DecoupledDescent(groups, lr="auto")
    groups[1]["lr"] = "auto"
    optimizer = dd.DecoupledDescent(groups, lr="auto")
    optimizer.attach(model)
    inputs, labels = make_problem()
    assert run(model, optimizer, inputs, labels, 2)[1] > 0
    unattached = dd.DecoupledDescent(
        [{"params": list(make_model().parameters()), "lr": "auto"}], lr=0.1
    )
    with pytest.raises(ValueError, match=r"Invalid learning rate: 'auto' in a parameter group"):
        unattached.step()


def test_without_closure_or_module():
    model = make_model()
    with pytest.raises(ValueError, match=r"(?s)step\(closure\).*torch.optim.LBFGS.*return loss"):
        dd.DecoupledDescent(model, lr="auto").step()
    bare = dd.DecoupledDescent(make_model().parameters(), lr="auto")
    with pytest.raises(ValueError, match=r"needs an attached optimizer.*attach\(module\)"):
        bare.step(lambda: torch.zeros(()))


def misuse(kind, model, optimizer, inputs, labels):
    """A closure that does what ``lr="auto"`` cannot work with."""
    half, calls = N // 2, []

    def loss_of(rows=slice(None)):
        return F.cross_entropy(model(inputs[rows]), labels[rows])

    def closure():
        calls.append(1)
        later = len(calls) > 1
        optimizer.zero_grad()
        if kind == "accumulation":
            for rows in (slice(half), slice(half, None)):
                loss = loss_of(rows)
                loss.backward()
            return loss
        batches = {"mini-batch": slice(half), "order": torch.arange(N).flip(0)}
        rows = batches.get(kind, slice(None))
        if kind == "another batch" and later:
            rows = slice(half)
        if kind == "other inputs" and later:
            loss = F.cross_entropy(model(inputs + 1), labels)
            loss.backward()
            return loss
        if kind == "eval later":
            model.train(not later)
        loss = loss_of(rows)
        if kind != "no backward":
            loss.backward()
        if kind == "clipped":
            for parameter in model.parameters():
                parameter.grad.mul_(0.5)
        results = {"nothing": None, "number": float(loss.detach()), "vector": loss.expand(2)}
        return results.get(kind, loss)

    return closure


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("mini-batch", RuntimeError, r"loss of all 45 samples.*batch holds 22.*number for mini"),
        ("order", RuntimeError, "or another order"),
        ("accumulation", RuntimeError, "runs the model once.*found 2 training forwards"),
        ("no backward", RuntimeError, r"step\(\) before loss.backward\(\)"),
        ("another batch", RuntimeError, "later call of the closure trained on other samples"),
        ("other inputs", RuntimeError, "later call of the closure trained on other samples"),
        ("eval later", RuntimeError, "later call of the closure did not do as the first"),
        ("clipped", RuntimeError, r"multiplied its gradients by 0.5, as clipping"),
        ("nothing", TypeError, r"must return the loss.*got NoneType"),
        ("number", TypeError, r"must return the loss.*got float"),
        ("vector", TypeError, r"must return the loss.*shape \(2,\)"),
    ],
)
def test_closures_that_are_misused(kind, error, message):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels), Drawn())
    run(model, optimizer, inputs, labels, 1)
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(misuse(kind, model, optimizer, inputs, labels))
    require_equal(before, everything(model, optimizer))
    model.train()
    run(model, optimizer, inputs, labels, 1)


def test_losses_that_are_not_finite():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss * float("nan")

    with pytest.raises(FloatingPointError, match="the loss is nan before the step"):
        optimizer.step(closure)


def test_sparse_gradients():
    inputs, labels = make_problem()
    model = make_model()
    model.table = nn.Embedding(5, C, sparse=True).double()
    # The probe has no forward mode of sparse embeddings.
    optimizer = attached(model, make_noise(inputs, labels), curvature="stein")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model[:3](inputs) + model.table(labels), labels)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="takes dense gradients"):
        optimizer.step(closure)


def test_many_processes(monkeypatch):
    model = make_model()
    optimizer = attached(model, None)
    monkeypatch.setattr(optimizer._attachment.ranks, "size", 2)
    with pytest.raises(ValueError, match="searches on one process, but 2 share"):
        optimizer.step(lambda: torch.zeros(()))


def test_a_policy_that_returns_nonsense():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, make_noise(inputs, labels), Forced([gradient_step(float("nan"))]))
    with pytest.raises(ValueError, match="policy Forced must return a finite point"):
        run(model, optimizer, inputs, labels, 1)
