"""The audit of Stein's curvature: what it finds, and that training does not notice it."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dd
from dd.data import xor
from dd.experiments.models import two_layer
from dd.functional import (
    centre_within_components,
    kink_signs,
    kink_terms,
    probe_curvature,
    rademacher,
    stein_curvature,
    stein_excess,
    stein_mismatch,
)
from dd.watch import audit, audit_result, model_watch
from tests.optimizer.test_optimizer import C, D, K, make_model, make_problem, train
from tests.reference import mismatch_of


def normal(seed: int, *shape: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- When, and by which figures ----------------------------------------------------------------


def test_forwards_are_audited_ever_more_rarely():
    due = [n for n in range(1, 2001) if audit.is_due(n)]
    assert due == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]


def quartic(seed: int, n: int, k: int, spread: float):
    """ℓ(r) = (Σ_j (r_j² + r_j⁴/6))/2 of two clusters at ±spread, and one Rademacher probe."""
    r = normal(seed, n, k)
    r[:, 0] += spread * (1 - 2 * (torch.arange(n) % 2))
    gradient = (r + r**3 / 3) / n
    probe = rademacher(r, torch.Generator().manual_seed(seed))
    return r, gradient, probe, (1 + r**2) * probe / n


def test_excess_has_mean_zero_and_unit_variance_with_the_right_components():
    n, clusters = 400, torch.arange(400) % 2
    found = []
    for seed in range(200):
        r, *others = quartic(seed, n, 3, spread=1.0)
        found.append(stein_excess(centre_within_components(r, clusters, 2), *others)[1])
    errors = torch.stack(found)
    # The mean of 200 has deviation 1/√200, the variance √(2/200); four and five of them.
    assert abs(float(errors.mean())) < 4 / math.sqrt(200)
    assert float(errors.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 200))


def test_excess_is_the_difference_of_the_traces_over_the_curvature():
    r, gradient, probe, product = quartic(1, 500, 3, spread=1.0)
    centred = r - r.mean(0)
    covariance = centred.T @ centred / len(r)
    curvature = probe_curvature(probe, product)
    stein = stein_curvature(centred, gradient, ridge=0.0)
    difference = torch.trace(covariance @ stein) - torch.trace(covariance @ curvature)
    scale = torch.linalg.svdvals(covariance @ curvature).sum()
    torch.testing.assert_close(
        stein_excess(centred, gradient, probe, product)[0], difference / scale
    )


@pytest.mark.parametrize("masses", [False, True], ids=["", "masses"])
def test_mismatch_equals_that_by_loops(masses):
    n, k, clusters = 60, 3, torch.arange(60) % 2
    r, gradient, probe, product = quartic(2, n, k, spread=1.0)
    r[:, 1] *= 0.1
    # Kinks of two units beside the quartic.
    pushes = 0.5 * (r > 0) * torch.tensor([1.0, 0.0, -1.0]).double() / n
    mass = 0.5 + normal(3, n).square() if masses else None
    kinks = kink_terms(r, pushes, kink_signs(r, pushes), mass, leaky=True)
    gradient = gradient + pushes
    centred, around = (centre_within_components(rows, clusters, 2) for rows in (r, gradient))
    found = stein_mismatch(centred, around, probe, product, kinks, 1e-3)
    expected = mismatch_of(r, gradient, clusters, probe, product, kinks, 1e-3)
    assert expected[0] > 0
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected).double())


def test_mismatch_of_units_sums_their_rows_first():
    n, k, clusters, unit = 60, 3, torch.arange(60) % 2, torch.arange(60) * 7 % 20
    r, gradient, probe, product = quartic(2, n, k, spread=1.0)
    pushes = 0.5 * (r > 0) * torch.tensor([1.0, 0.0, -1.0]).double() / n
    kinks = kink_terms(r, pushes, kink_signs(r, pushes), None, leaky=True)
    gradient = gradient + pushes
    centred, around = (centre_within_components(rows, clusters, 2) for rows in (r, gradient))
    found = stein_mismatch(centred, around, probe, product, kinks, 1e-3, unit=unit)
    expected = mismatch_of(r, gradient, clusters, probe, product, kinks, 1e-3, unit)
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected).double())
    alone = stein_mismatch(centred, around, probe, product, kinks, 1e-3, unit=torch.arange(n))
    plain = stein_mismatch(centred, around, probe, product, kinks, 1e-3)
    torch.testing.assert_close(alone, plain)
    assert not torch.isclose(found[1], plain[1], rtol=0.05)


def mismatch(r, gradient, probe, product, clusters):
    count = int(clusters.max()) + 1
    centred, around = (centre_within_components(rows, clusters, count) for rows in (r, gradient))
    none = torch.zeros_like(r)
    return torch.stack(stein_mismatch(centred, around, probe, product, none, ridge=1e-12))


def test_mismatch_of_gaussian_components_is_chance_however_k_is_conditioned():
    """Σ D²/s² over six entries has expectation six and variance twelve, to first order.

    Standardised over 300 data sets its mean is known to 1/√300, here to four of them and what is
    beyond first order, of relative size k/n in each entry.
    """
    n, clusters, allowance = 800, torch.arange(800) % 2, math.sqrt(3) * 3 / 800
    for width in (1.0, 1e-3):
        found = []
        for seed in range(300):
            r, gradient, probe, product = quartic(seed, n, 3, spread=1.0)
            # The last unit in another measure, in which its K is w² and its curvature over w².
            scale = torch.tensor([1.0, 1.0, width]).double()
            others = gradient / scale, probe, product / scale.square()
            found.append(mismatch(r * scale, *others, clusters))
        errors = torch.stack(found)[:, 1]
        assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(300) + allowance
        # Entries that share factors are not independent, nor Gaussian.
        assert 0.5 < float(errors.std()) < 2


def test_mismatch_sees_what_the_trace_does_not():
    """A direction of little variance in which R is two points: K H hardly weighs it."""
    n, width = 1000, 1e-2
    r, gradient, probe, product = quartic(4, n, 2, spread=0.0)
    r[:, 1] = width * (1 - 2 * (torch.arange(n) // 2 % 2))
    # Along the second unit ℓ = 50 w² sin²(r/w)/2 in place of the quartic.
    angle = 2 * r[:, 1] / width
    gradient[:, 1] = 50 * width * angle.sin() / 2 / n
    product[:, 1] = 50 * angle.cos() * probe[:, 1] / n
    clusters = torch.zeros(n, dtype=torch.long)
    share, errors = mismatch(r, gradient, probe, product, clusters)
    centred = r - r.mean(0)
    excess, of_trace = stein_excess(centred, gradient, probe, product)
    # At ±w the gradient is ±25 w sin 2 and the curvature 50 cos 2: Stein's is 25 sin 2. The rest of
    # the curvature, 2 along the first unit, is known to 1/√n of it.
    expected = abs(25 * math.sin(2) - 50 * math.cos(2)) / math.hypot(50 * math.cos(2), 2)
    assert float(share) == pytest.approx(expected, rel=4 / math.sqrt(n))
    assert float(errors) > audit_result.MISMATCH_ERRORS
    assert abs(float(excess)) < audit_result.SHARE / 5
    assert abs(float(of_trace)) < audit_result.STANDARD_ERRORS


# --- XOR ---------------------------------------------------------------------------------------


def make_xor(ids: str = "clusters", activation: str = "tanh_squared", seed: int = 0):
    """Stein's curvature, d = 250, n = 1000, k = 4."""
    split = xor(dimension=250, num_train=1000, num_test=10, separation=2.5, noise=1.0, seed=seed)
    model = two_layer(
        250,
        num_outputs=2,
        width=4,
        activation=activation,
        hidden_scale=0.5,
        generator=torch.Generator().manual_seed(seed),
    )
    components = split.train_targets if ids == "labels" else split.train_components
    noise = dd.NoiseModel.isotropic(split.train_inputs, components)
    optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, curvature="stein")
    return model, optimizer, split.train_inputs, split.train_targets


def train_on_xor(*arguments) -> None:
    train(*make_xor(*arguments), steps=50)


def warnings_on_xor(*arguments) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dd.CurvatureWarning)
        train_on_xor(*arguments)
    return sum(issubclass(w.category, dd.CurvatureWarning) for w in caught)


@pytest.mark.parametrize("activation", ["tanh_squared", "relu"])
@pytest.mark.parametrize(("ids", "warned"), [("labels", 1), ("clusters", 0)])
def test_labels_are_told_from_clusters(ids, warned, activation):
    assert [warnings_on_xor(ids, activation, seed) for seed in range(3)] == [warned] * 3


def test_the_warning_points_at_the_backward_call_and_names_the_remedies():
    with pytest.warns(dd.ComponentWarning, match=r'curvature="probe".*find_comp') as caught:
        train_on_xor("labels", "tanh_squared", 0)
    assert caught[0].filename.endswith("test_optimizer.py")


# --- Tables ------------------------------------------------------------------------------------


def make_table(seed: int, n: int = 300):
    """Two numbers, functions of them and the sign of one as columns: no mixture of Gaussians."""
    z = normal(seed, n, 2).float()
    a, b = z.unbind(1)
    inputs = torch.stack([a, b, a**2, b**2, a * b, a.sign()], 1)
    return (inputs - inputs.mean(0)) / inputs.std(0), (a * b + a > 0).long()


def on_table(seed: int, **settings):
    inputs, labels = make_table(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2))
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.05, momentum=0.9, noise=noise, **settings)
    return model, optimizer, inputs, labels


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_are_not_gaussian_are_told_at_once(seed):
    loop = on_table(seed, curvature="stein")
    with pytest.warns(dd.CurvatureWarning, match=r"Gaussian.*curvature=\"probe\"") as caught:
        train(*loop, steps=10)
    assert [w.category for w in caught] == [dd.CurvatureWarning]
    assert "training forward 1 " in str(caught[0].message) or "2 " in str(caught[0].message)
    assert caught[0].filename.endswith("test_optimizer.py")
    assert loop[1]._attachment.oversight.has_found


def test_the_default_is_not_audited(measured):
    loop = on_table(0)
    train(*loop, steps=10)
    assert measured == []
    assert not loop[1]._attachment.oversight.has_found


def test_a_suspicion_has_the_next_forward_audited(measured):
    model, optimizer, inputs, labels = make_xor()
    watch = optimizer._attachment.oversight
    train(model, optimizer, inputs, labels, steps=2)
    assert len(measured) == 2
    watch.is_suspicious = True
    train(model, optimizer, inputs, labels, steps=2)
    assert len(measured) == 3
    # One that cannot be audited leaves the suspicion for the next.
    watch.is_suspicious = True
    with torch.autograd.forward_ad.dual_level():
        train(model, optimizer, inputs, labels, steps=2)
    assert len(measured) == 3
    train(model, optimizer, inputs, labels, steps=1)
    assert len(measured) == 4
    assert not watch.is_suspicious


@pytest.fixture
def compared(monkeypatch):
    """Arguments of comparisons as matrices."""
    found, inner = [], audit.stein_mismatch

    def spy(*arguments, **rest):
        found.append(arguments)
        return inner(*arguments, **rest)

    monkeypatch.setattr(audit, "stein_mismatch", spy)
    return found


def audited_once(activation, rows):
    inputs, targets = make_problem()
    noise = dd.NoiseModel.isotropic(inputs, targets)
    model = make_model(activation=activation)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, curvature="stein")
    train(model, optimizer, inputs[:rows], targets[:rows], steps=1)


def test_too_few_rows_are_not_compared_as_matrices(compared, measured):
    audited_once(nn.Tanh, audit.ROWS_A_UNIT * K - 1)
    assert (len(measured), len(compared)) == (1, 0)
    audited_once(nn.Tanh, audit.ROWS_A_UNIT * K)
    assert (len(measured), len(compared)) == (2, 1)


@pytest.mark.parametrize(
    ("activation", "has_kinks"), [(nn.Tanh, False), (nn.ReLU, True), (nn.LeakyReLU, True)]
)
def test_the_probe_that_stein_is_held_against_has_kinks(activation, has_kinks, compared):
    audited_once(activation, 120)
    (_, _, _, _, kinks, ridge), *_ = compared
    assert bool(kinks.any()) == has_kinks
    assert ridge == 1e-4


# --- Training does not notice ------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Counts its backward passes."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        Doubled.calls += 1
        return 2 * gradient


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(K, 2, batch_first=True)

    def forward(self, x):
        return x + self.inner(x[:, None], x[:, None], x[:, None])[0][:, 0]


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


HEADS = {
    "tanh": nn.Tanh,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "layer norm": lambda: nn.LayerNorm(K),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(K), nn.GELU()),
    "dropout": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.3)),
    "attention": Attention,
    "custom function": lambda: Apply(Doubled.apply),
    "fft and sort": lambda: Apply(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=K).sort(1).values),
    "checkpoint": lambda: Apply(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "reentrant checkpoint": lambda: Apply(lambda x: checkpoint(torch.tanh, x, use_reentrant=True)),
    "compiled": lambda: torch.compile(nn.Tanh(), backend="aot_eager"),
    "compiled function": lambda: Apply(torch.compile(torch.tanh, backend="aot_eager")),
    "in-place indexing": lambda: Apply(lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0.5)),
    "out of torch": lambda: Apply(lambda x: torch.tanh(x) * float(x.detach().numpy().mean())),
}


def square(output, targets):
    return F.mse_loss(output[:, 0], targets.to(output.dtype))


def huber(output, targets):
    return F.huber_loss(output[:, 0], targets.to(output.dtype))


def summed(output, targets):
    return F.cross_entropy(output, targets, reduction="sum", label_smoothing=0.1)


def trajectory(model, monkeypatch, due: bool, steps: int = 4, **settings):
    """Losses, gradients, state and random state of a run, audited at every forward or at none."""
    monkeypatch.setattr(model_watch, "is_due", lambda forward: due)
    inputs, targets = make_problem()
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(model, lr=0.05, noise=noise, curvature="stein")
    losses = train(model, optimizer, inputs, targets, steps=steps, **settings)
    gradients = [p.grad for p in model.parameters()]
    result = [torch.tensor(losses), optimizer.shadow, torch.get_rng_state(), *gradients]
    return [*result, *model.state_dict().values()]


def require_equal(audited, plain):
    assert len(audited) == len(plain)
    for one, other in zip(audited, plain, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, square, huber, summed])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:torch.*",
    "ignore:.*:DeprecationWarning",
    # Sorted units are kinks all over, on 120 samples.
    "ignore:.*at training forward.*:dd.CurvatureWarning",
)
def test_audited_training_is_unaudited_training_bit_for_bit(name, loss_fn, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, K), HEADS[name](), nn.Linear(K, C)).double()
    plain = trajectory(model, monkeypatch, due=False, loss_fn=loss_fn)
    require_equal(trajectory(model, monkeypatch, due=True, loss_fn=loss_fn), plain)


@pytest.fixture
def measured(monkeypatch):
    """Excesses that audits measured."""
    found, inner = [], audit.stein_excess

    def spy(*arguments):
        found.append(inner(*arguments))
        return found[-1]

    monkeypatch.setattr(audit, "stein_excess", spy)
    return found


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        *((name, 4) for name in ("tanh", "relu in place", "silu", "mish", "dropout", "attention")),
        *((name, 4) for name in ("layer norm", "batch norm", "in-place indexing")),
        *((name, 0) for name in ("custom function", "checkpoint", "reentrant checkpoint")),
        *((name, 0) for name in ("compiled", "compiled function")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.*", "ignore:.*:DeprecationWarning")
def test_which_heads_are_audited(name, runs, monkeypatch, measured):
    model = nn.Sequential(nn.Linear(D, K), HEADS[name](), nn.Linear(K, C)).double()
    Doubled.calls = 0
    trajectory(model, monkeypatch, due=True)
    assert len(measured) == runs
    assert Doubled.calls == (4 if name == "custom function" else 0)


def hook_module(model):
    calls = []
    model[1].register_full_backward_hook(lambda *_: calls.append(1))
    return calls


def hook_tensor(model):
    calls = []
    model[1].register_forward_hook(
        lambda _, __, output: output.register_hook(lambda g: calls.append(1)) and None
    )
    return calls


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_models_that_would_notice_are_not_audited():
    assert audit.is_safe(make_model())
    assert not audit.is_safe(nn.Sequential(torch.compile(make_model(), backend="eager")))
    hooked = make_model()
    hooked[1].register_full_backward_pre_hook(lambda *_: None)
    assert not audit.is_safe(hooked)
    with torch.autograd.forward_ad.dual_level():
        assert not audit.is_safe(make_model())
    with torch.autograd.detect_anomaly(check_nan=False):
        assert not audit.is_safe(make_model())


@pytest.mark.parametrize("hook", [hook_module, hook_tensor])
def test_hooks_on_gradients_are_called_once_a_step(hook, monkeypatch):
    monkeypatch.setattr(model_watch, "is_due", lambda forward: True)
    inputs, targets = make_problem()
    model = make_model()
    calls = hook(model)
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(model, noise=noise, curvature="stein")
    train(model, optimizer, inputs, targets, steps=3)
    assert len(calls) == 3


def test_retained_gradients_are_not_doubled(monkeypatch):
    monkeypatch.setattr(model_watch, "is_due", lambda forward: True)
    inputs, targets = make_problem()
    model = make_model()
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(model, noise=noise, curvature="stein")
    output = model(inputs)
    output.retain_grad()
    F.cross_entropy(output, targets).backward()
    expected = (output.detach().softmax(1) - F.one_hot(targets, C)) / len(targets)
    torch.testing.assert_close(output.grad.as_subclass(torch.Tensor), expected)
    optimizer.step()


@pytest.mark.parametrize("kind", ["bfloat16", "create_graph", "explicit", "probe first", "level"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:.* was trained by another optimizer")
def test_unusual_loops_go_on(kind, monkeypatch):
    monkeypatch.setattr(model_watch, "is_due", lambda forward: True)
    inputs, targets = make_problem(dtype=torch.float32)
    model, other = make_model(dtype=torch.float32), make_model(1, dtype=torch.float32)
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, curvature="stein")
    for _ in range(3):
        optimizer.zero_grad()
        if kind == "bfloat16":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
        elif kind == "create_graph":
            F.cross_entropy(model(inputs), targets).backward(create_graph=True)
        elif kind == "explicit":
            F.cross_entropy(model(inputs), targets).backward(torch.tensor(1.0), retain_graph=True)
        elif kind == "level":
            with torch.autograd.forward_ad.dual_level():
                F.cross_entropy(model(inputs), targets).backward()
        else:
            probing = dd.DecoupledDescent(other, lr=0.1, curvature="probe")
            probing.zero_grad()
            first, second = (F.cross_entropy(m(inputs), targets) for m in (model, other))
            (first + second).backward()
            probing.step()
            probing.detach()
        optimizer.step()
    assert bool(optimizer.shadow.any())
    assert not audit.Audit._pending


def test_masses_of_samples_weigh_the_probe(monkeypatch, measured):
    """Right ids, masses from 0.1 to 1.9: without weights the two curvatures would disagree."""
    monkeypatch.setattr(model_watch, "is_due", lambda forward: True)
    n, d = 4000, 40
    ids = torch.arange(n) % 2
    scale = 0.1 + 1.8 * (torch.arange(n) // 2 % 2)
    inputs = normal(0, n, d) * scale.sqrt()[:, None] + 2 * ids[:, None]
    model = nn.Sequential(nn.Linear(d, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    noise = dd.NoiseModel.fit(inputs, ids, per_sample=True)
    optimizer = dd.DecoupledDescent(model, lr=0.0, noise=noise, curvature="stein")

    def loss_fn(output, _):
        return (output**2).mean() + (output[:, 0] ** 4).mean()

    train(model, optimizer, inputs, ids, steps=1, loss_fn=loss_fn)
    assert abs(float(measured[0][1])) < 4
