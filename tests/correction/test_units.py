"""Samples of several rows, and groups of rows, against the slow twin (``docs/several-rows.md``)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction import shadow_step
from dd.curvature.estimators import Probe, Stein
from tests import reference

N, P, D, K, C = 12, 3, 7, 3, 2
SPECTRUM = ([1.4, 0.5], [3.0, 4.0])
CURVATURE = torch.tensor([[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.4]], dtype=torch.float64)


class Pooled(nn.Module):
    """The decoupled layer on every row, pooled behind the activation."""

    def __init__(self, pool):
        super().__init__()
        self.layer, self.head, self.pool = nn.Linear(D, K), nn.Linear(K, C), pool

    def forward(self, x):
        return self.head(self.pool(torch.tanh(self.layer(x))))


POOLS = {
    "mean": lambda h: h.mean(-2),
    "log-sum-exp": lambda h: torch.logsumexp(2 * h, -2),
    "weighted": lambda h: (torch.arange(1.0, 1.0 + h.shape[-2]).to(h).unsqueeze(1) * h).sum(-2),
}


def data(seed=0, padded=()):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, P, D, generator=g).double()
    inputs = inputs + torch.randn(N, 1, D, generator=g).double()
    labels = torch.arange(N) % C
    inputs[:, 0, 0] += 2.0 * labels
    for sample in padded:
        inputs[sample, P - 1] = 0.0
    return inputs, labels


def model_of(pool, seed=0):
    torch.manual_seed(seed)
    return Pooled(POOLS[pool]).double()


def head_of(model):
    parts = model.layer.bias, model.head.weight, model.head.bias
    return reference.Head(*(p.detach().clone() for p in parts))


def mean_loss(r, head, labels, pool):
    losses = [
        reference.unit_loss(r[i], head, int(labels[i]), torch.tanh, POOLS[pool])
        for i in range(len(labels))
    ]
    return sum(losses) / len(losses)


def two_bins(noise):
    """The noise model with a spectrum given by hand."""
    values, counts = (torch.tensor(part, dtype=torch.float64) for part in SPECTRUM)
    return replace(noise, eigenvalues=values, multiplicities=counts)


def case_of(inputs, labels, gram, pool):
    """The data of samples of several rows, row by row, for the twin."""
    count = N * P
    units = torch.arange(N).repeat_interleave(P)
    whole = torch.zeros(count, count).double()
    for i in range(N):
        whole[i * P : (i + 1) * P, i * P : (i + 1) * P] = gram[i]

    def gradient(r, head, batch):
        samples = sorted({row // P for row in batch})

        def loss(rows, parts):
            return mean_loss(rows.view(N, P, K)[samples], parts, labels[samples], pool)

        return torch.func.grad(loss, argnums=(0, 1))(r, head)

    return reference.UnitCase(inputs.reshape(count, D), units, whole, gradient)


def train(model, optimizer, inputs, labels, batches):
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    optimizer.state_dict()  # brings every row up to date


@pytest.fixture
def fixed_curvature(monkeypatch):
    """So that nothing hangs on an estimator that pools steps."""
    monkeypatch.setattr(shadow_step, "step_curvature", lambda *_: CURVATURE)


def test_gram_matrices_are_those_of_the_rows_around_their_means():
    inputs, labels = data()
    units = dd.NoiseModel.fit(inputs, labels).units
    torch.testing.assert_close(units.gram, reference.unit_gram(inputs, labels))
    assert units.rows.tolist() == [[i * P + a for a in range(P)] for i in range(N)]


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("size", [N, 4])
def test_every_row_of_a_unit_is_pushed_by_all_of_them(fixed_curvature, pool, momentum, size):
    inputs, labels = data()
    model, noise = model_of(pool), two_bins(dd.NoiseModel.fit(inputs, labels))
    start = model.layer.weight.detach().T.clone(), head_of(model)
    optimizer = dd.DecoupledDescent(model, lr=0.3, momentum=momentum, noise=noise)
    g = torch.Generator().manual_seed(1)
    batches = [b for _ in range(3) for b in torch.randperm(N, generator=g).split(size)]
    train(model, optimizer, inputs, labels, batches)
    weight, shadow = reference.unit_descent(
        case_of(inputs, labels, reference.unit_gram(inputs, labels), pool),
        start,
        [[int(i) * P + a for i in batch for a in range(P)] for batch in batches],
        reference.Rule(0.3, momentum),
        SPECTRUM,
        lambda *_: CURVATURE,
    )
    torch.testing.assert_close(model.layer.weight.detach().T, weight, rtol=1e-9, atol=1e-12)
    assert optimizer.shadow.shape == (2, N, P, K)
    torch.testing.assert_close(optimizer.shadow.flatten(1, 2), shadow, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize("size", [N * P, 8, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_rows_of_a_group_are_pushed_in_whatever_batch_they_are(fixed_curvature, size, momentum):
    inputs, labels = data()
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(N * P - 5, generator=g)
    groups = torch.arange(N).repeat_interleave(P)[order]
    rows, targets = inputs.flatten(0, 1)[order], labels.repeat_interleave(P)[order]
    count = len(rows)
    model = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()
    noise = two_bins(dd.NoiseModel.fit(rows, targets, groups=10 * groups - 3))
    start = model[0].weight.detach().T.clone(), head_of_plain(model)
    optimizer = dd.DecoupledDescent(model, lr=0.3, momentum=momentum, noise=noise, head=False)
    batches = [b for _ in range(3) for b in torch.randperm(count, generator=g).split(size)]
    train(model, optimizer, rows, targets, batches)

    means = torch.stack([rows[targets == label].mean(0) for label in range(C)])
    kept = torch.stack([1 - 1 / (targets == label).sum().double() for label in range(C)])[targets]
    z = rows - means[targets]
    gram = z @ z.T / (kept[:, None] * kept).sqrt() / (z.square().sum() / (count - C))

    def gradient(r, head, batch):
        def loss(every, parts):
            losses = [
                reference.sample_loss(every[i], parts, int(targets[i]), torch.tanh) for i in batch
            ]
            return sum(losses) / len(losses)

        return torch.func.grad(loss, argnums=(0, 1))(r, head)

    weight, shadow = reference.unit_descent(
        reference.UnitCase(rows, groups, gram, gradient),
        start,
        [batch.tolist() for batch in batches],
        reference.Rule(0.3, momentum),
        SPECTRUM,
        lambda *_: CURVATURE,
    )
    torch.testing.assert_close(model[0].weight.detach().T, weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizer.shadow, shadow, rtol=1e-9, atol=1e-12)


def head_of_plain(model):
    parts = model[0].bias, model[2].weight, model[2].bias
    return reference.Head(*(p.detach().clone() for p in parts))


def curvature_of_one_step(monkeypatch, model, inputs, labels, noise, kind):
    """H of the first step, and what was observed of R, shape (n, P, k)."""
    found = []
    original = shadow_step.step_curvature

    def seen(attachment, pushes, *rest):
        found.append((original(attachment, pushes, *rest), pushes.observed))
        return found[-1][0]

    monkeypatch.setattr(shadow_step, "step_curvature", seen)
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, curvature=kind)
    train(model, optimizer, inputs, labels, [torch.arange(N)])
    ((curvature, observed),) = found
    return curvature, observed.view(N, P, K)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("pool", POOLS)
def test_probe_weighs_pairs_of_rows_as_their_noise_goes_together(monkeypatch, pool):
    inputs, labels = data()
    model, noise = model_of(pool), dd.NoiseModel.fit(inputs, labels)
    r, head = (inputs @ model.layer.weight.T).detach(), head_of(model)
    curvature, probe = curvature_of_one_step(monkeypatch, model, inputs, labels, noise, "probe")
    expected = reference.unit_probe(
        lambda rows: mean_loss(rows, head, labels, pool),
        r,
        probe,
        reference.unit_gram(inputs, labels),
    )
    torch.testing.assert_close(curvature, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.parametrize("pool", POOLS)
def test_stein_takes_k_over_rows_and_the_gradients_over_samples(monkeypatch, pool):
    inputs, labels = data()
    model, noise = model_of(pool), dd.NoiseModel.fit(inputs, labels)
    r, head = (inputs @ model.layer.weight.T).detach(), head_of(model)
    g = torch.func.grad(lambda rows: mean_loss(rows, head, labels, pool))(r)
    curvature, _ = curvature_of_one_step(monkeypatch, model, inputs, labels, noise, "stein")
    expected = reference.unit_stein(r, g, labels, 1e-4)
    torch.testing.assert_close(curvature, expected, rtol=1e-8, atol=1e-11)


class Masked(Pooled):
    """Pools the rows that are there."""

    def forward(self, x):
        there = (x != 0).any(-1, keepdim=True)
        hidden = torch.tanh(self.layer(x)) * there
        return self.head(hidden.sum(1) / there.sum(1))


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.parametrize("kind", ["probe", "stein"])
def test_padding_changes_nothing(kind):
    """Samples of two rows, with a row of zeros or without, are trained and corrected alike."""
    inputs, labels = data()
    padded = inputs.clone()
    padded[:, P - 1] = 0.0
    found = []
    for these in (padded, inputs[:, : P - 1]):
        torch.manual_seed(0)
        model = Masked(None).double()
        noise = dd.NoiseModel.fit(these, labels)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, curvature=kind)
        train(model, optimizer, these, labels, [torch.arange(N)])
        found.append((noise, model, optimizer))
    (noise, model, optimizer), (bare_noise, bare_model, bare) = found
    torch.testing.assert_close(noise.eigenvalues, bare_noise.eigenvalues)
    torch.testing.assert_close(noise.units.gram[:, :-1, :-1], bare_noise.units.gram)
    assert not noise.units.gram[:, -1].any()
    assert not optimizer.shadow[:, :, -1].any()
    # The first shadows are pushes alone: a probe's signs are drawn for all rows in one.
    torch.testing.assert_close(optimizer.shadow[:, :, :-1], bare.shadow)
    torch.testing.assert_close(model.layer.weight, bare_model.layer.weight)
    if kind == "stein":
        train(model, optimizer, padded, labels, [torch.arange(N)] * 3)
        train(bare_model, bare, inputs[:, : P - 1], labels, [torch.arange(N)] * 3)
        torch.testing.assert_close(optimizer.shadow[:, :, :-1], bare.shadow)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_one_row_a_sample_is_what_it_always_was():
    inputs, labels = data()
    shadows = []
    for these in (inputs[:, :1], inputs[:, 0]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Flatten(), nn.Linear(K, C)).double()
        noise = dd.NoiseModel.fit(these, labels, per_sample=None if these.dim() == 3 else True)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=False)
        train(model, optimizer, these, labels, [torch.arange(N)] * 4)
        shadows.append(optimizer.shadow.flatten())
    # A mass of one's own is a Gram matrix of one row, to what few samples tell of the mean mass.
    ratio = torch.linalg.lstsq(shadows[1].unsqueeze(1), shadows[0].unsqueeze(1)).solution
    assert float(ratio) == pytest.approx(1.0, abs=2 / N**0.5)
    assert float(torch.corrcoef(torch.stack(shadows))[0, 1]) > 0.95


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
@pytest.mark.parametrize(
    ("fit", "shape", "message"),
    [
        ((N * P, D), (N, P, D), r"fitted on inputs of shape \(n, 7\)"),
        ((N, P, D), (N * P, D), r"fitted on inputs of shape \(n, 3, 7\)"),
        ((N, P, D), (N, P - 1, D), "samples of 2 rows"),
    ],
)
def test_a_noise_model_of_another_shape_is_refused(fit, shape, message):
    inputs, _ = data()
    noise = dd.NoiseModel.fit(inputs.reshape(fit))
    model = model_of("mean")
    model.pool = lambda h: h
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=False)
    assert optimizer.layer is model.layer
    given = inputs[:, : shape[1]] if len(shape) == 3 else inputs.reshape(shape)
    with pytest.raises(ValueError, match=message):
        model(given)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_what_does_not_follow_units_is_refused():
    inputs, labels = data()
    noise = dd.NoiseModel.fit(inputs, labels)
    for settings in ({"head": True}, {"lr": "auto"}, {"curvature": "exact"}, {"damping": 0.5}):
        model = model_of("mean")
        given = {"lr": 0.3, "noise": None if "head" in settings else noise, **settings}
        optimizer = dd.DecoupledDescent(model, **given)
        assert optimizer.layer is model.layer
        with pytest.raises(ValueError, match="are not followed yet with"):
            model(inputs)
    rows, labels, ids = grouped()
    model = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C))
    noise = dd.NoiseModel.fit(rows, labels, groups=ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = dd.decouple(model, optimizer, noise=noise.with_means_apart(), head=True)
    assert tracker.layer is model[0]
    with pytest.raises(ValueError, match="are not followed yet with head=True"):
        model(rows)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
@pytest.mark.parametrize("size", [N, 4])
def test_any_optimizer_moves_units_as_decoupled_descent_does(size):
    """SGD with momentum, followed from outside, leaves weights and shadows that DD leaves."""
    inputs, labels = data()
    g = torch.Generator().manual_seed(1)
    batches = [b for _ in range(3) for b in torch.randperm(N, generator=g).split(size)]
    found = []
    for outside in (False, True):
        model, noise = model_of("mean"), dd.NoiseModel.fit(inputs, labels)
        rule = {"lr": 0.3, "momentum": 0.7}
        if outside:
            optimizer = torch.optim.SGD(model.parameters(), **rule)
            tracker = dd.decouple(model, optimizer, noise=noise, curvature="stein")
        else:
            optimizer = tracker = dd.DecoupledDescent(model, **rule, noise=noise, curvature="stein")
        train(model, optimizer, inputs, labels, batches)
        tracker.state_dict()
        found.append((model.layer.weight.detach(), tracker.shadow))
    for own, followed in zip(*found, strict=True):
        torch.testing.assert_close(followed, own, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
def test_a_regression_on_units_is_told():
    inputs, clusters = planted(80)
    labels = clusters // 2
    model = nn.Sequential(nn.Linear(20, K), nn.Tanh(), nn.Flatten(), nn.Linear(2 * K, C))
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    dd.decouple(model, optimizer, noise=noise)
    with pytest.warns(dd.ResponseWarning, match="rows that are left out together"):
        train(model, optimizer, inputs, labels, [torch.arange(80)] * 3)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
@pytest.mark.parametrize("size", [120, 25])
def test_head_of_groups_meets_each_row_without_its_group(size):
    """Copies of a sample in one group are that sample: head, biases and means move alike."""
    g = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(120, D, generator=g).double(), torch.arange(120) % C
    rows[:, 0] += 2.0 * labels
    order = torch.arange(120) if size == 120 else torch.randperm(120, generator=g)
    batches = list(order.split(size)) * 2
    found = []
    for copies in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()
        ids = torch.arange(120).repeat_interleave(copies)
        noise = dd.NoiseModel.fit(
            rows.repeat_interleave(copies, 0), labels.repeat_interleave(copies), groups=ids
        )
        noise = noise.with_every_direction_apart()
        optimizer = dd.DecoupledDescent(
            model, lr=0.3, momentum=0.5, noise=noise, head=True, curvature="stein"
        )
        some = [(b.unsqueeze(1) * copies + torch.arange(copies)).flatten() for b in batches]
        given = rows.repeat_interleave(copies, 0), labels.repeat_interleave(copies)
        train(model, optimizer, *given, some)
        shadows = [optimizer.state[p]["shadow"] for p in (model[2].weight, model[0].bias)]
        shadows.append(optimizer.state[model[0].weight]["signal_shadow"])
        found.append([*(shadow[::copies] for shadow in shadows), model[2].weight.detach()])
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(three, one, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.CurvatureWarning")
def test_state_goes_on_where_it_was_saved():
    inputs, labels = data()
    noise = dd.NoiseModel.fit(inputs, labels)
    g = torch.Generator().manual_seed(1)
    batches = [b for _ in range(4) for b in torch.randperm(N, generator=g).split(5)]
    model = model_of("mean")
    optimizer = dd.DecoupledDescent(model, lr=0.3, momentum=0.5, noise=noise, curvature="probe")
    train(model, optimizer, inputs, labels, batches[:5])
    again = model_of("mean", seed=3)
    other = dd.DecoupledDescent(again, lr=0.3, momentum=0.5, noise=noise, curvature="probe")
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, inputs, labels, batches[5:])
    train(again, other, inputs, labels, batches[5:])
    assert torch.equal(optimizer.shadow, other.shadow)
    assert torch.equal(model.layer.weight, again.layer.weight)


def grouped(size=4, count=30, seed=0):
    """Rows of groups that share noise and a label, in no order."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % C
    rows = torch.randn(count, 1, D, generator=g) + 0.3 * torch.randn(count, size, D, generator=g)
    rows[:, :, 0] += 2.0 * labels.unsqueeze(1)
    order = torch.randperm(count * size, generator=g)
    ids = torch.arange(count).repeat_interleave(size)[order]
    return rows.flatten(0, 1)[order], labels.repeat_interleave(size)[order], ids


@pytest.mark.filterwarnings("ignore::dd.StrainWarning")
def test_estimate_counts_groups():
    rows, labels, ids = grouped()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C))
    noise = dd.NoiseModel.fit(rows, labels, groups=ids)
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=False)
    train(model, optimizer, rows, labels, [torch.arange(len(rows))] * 3)
    kept = []

    def losses(batch):
        found = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        kept.append(found.double())
        return torch.stack([found, torch.zeros_like(found)], 1)

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    batches = [(rows[b], labels[b]) for b in order.split(50)]
    found = optimizer.estimate(batches, losses, confidence=0.9)
    values, unit = torch.cat(kept), ids[order]
    spread = sum(float((values - values.mean())[unit == i].sum()) ** 2 for i in range(30))
    # Of groups as they stand, with the factor for few of them and the width of docs/theory.md.
    deviation = (spread * 30 / 29) ** 0.5 / len(values)
    half = float(found.upper[0] - found.lower[0]) / 2
    assert half / deviation == pytest.approx(1.7 * 1.6449, rel=1e-4)
    assert found.num_samples == 30
    # Of figures that do not vary, as wide as that many independent samples leave it.
    alone = dd.Estimate.of_sums(torch.zeros(()), torch.zeros(()), 30, 0.9)
    assert float(found.upper[1]) == pytest.approx(float(alone.upper))


def test_copies_in_one_group_are_no_copies():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(120, D, generator=g).repeat(3, 1)
    ids = torch.arange(120).repeat(3)
    assert dd.NoiseModel.fit(rows).copies == 240
    noise = dd.NoiseModel.fit(rows, groups=ids)
    assert noise.copies == 0
    assert noise.units.correlation == pytest.approx(1.0, rel=1e-4)
    assert noise.units.effective_rows == pytest.approx(120, rel=1e-4)


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore:.*training forward")
@pytest.mark.parametrize("pool", ["amax", "mean"])
def test_what_a_probe_does_not_tell_of_several_rows_is_said(pool, recwarn):
    inputs, labels = data()
    for kind in ("stein", "probe"):
        model, noise = model_of("mean"), dd.NoiseModel.fit(inputs, labels)
        model.pool = lambda h: getattr(h, pool)(-2)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, curvature=kind)
        train(model, optimizer, inputs, labels, [torch.arange(N)] * 2)
        told = [str(w.message) for w in recwarn if w.category is dd.CurvatureWarning]
        assert len(told) == (kind == "probe")
        assert all(("a maximum over the rows" in text) == (pool == "amax") for text in told)


def planted(count=400):
    """Two clusters a class far apart, planted in one of two rows that share noise."""
    g = torch.Generator().manual_seed(0)
    clusters = torch.arange(count) % 4
    inputs = torch.randn(count, 2, 20, generator=g) + torch.randn(count, 1, 20, generator=g)
    inputs[:, 0, 0] += 6.0 * (clusters < 2) * (1 - 2 * (clusters % 2))
    inputs[:, 0, 1] += 6.0 * (clusters >= 2) * (1 - 2 * (clusters % 2))
    return inputs, clusters


@pytest.mark.filterwarnings("ignore::dd.StrainWarning", "ignore::dd.ShadowWarning")
@pytest.mark.parametrize("pooled", [True, False], ids=["samples", "groups"])
@pytest.mark.parametrize("ids", ["clusters", "labels"])
def test_the_default_of_several_rows_is_steins_while_audits_agree(pooled, ids, recwarn):
    inputs, clusters = planted()
    labels = clusters // 2
    known = clusters if ids == "clusters" else labels
    torch.manual_seed(0)
    layers = [nn.Linear(20, 4), nn.GELU()]
    if pooled:
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))
        noise = dd.NoiseModel.fit(inputs, known)
    else:
        model = nn.Sequential(*layers, nn.Linear(4, 2))
        noise = dd.NoiseModel.fit(inputs[:, 0], known, groups=torch.arange(len(inputs)) // 2)
        inputs = inputs[:, 0]
    optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, head=False)
    found = optimizer._attachment
    assert isinstance(found.estimator, Stein) == pooled
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    told = [w for w in recwarn if issubclass(w.category, dd.ComponentWarning)]
    fell_back = pooled and ids == "labels"
    assert len(told) == fell_back
    assert isinstance(found.estimator, Stein) == (pooled and not fell_back)
    if fell_back:
        assert "From here on it is found by a probe" in str(told[0].message)
        assert isinstance(found.estimator, Probe)
        # A run that goes on from its state does so by the probe.
        torch.manual_seed(0)
        again = dd.DecoupledDescent(copy.deepcopy(model), lr=0.5, noise=noise)
        again.load_state_dict(optimizer.state_dict())
        next(again._attachment.module.children())(inputs)
        assert isinstance(again._attachment.estimator, Probe)
        # What it is said by is not said again.
        assert not [w for w in recwarn if w.category is dd.CurvatureWarning]


def test_groups_are_checked():
    rows, labels, ids = grouped()
    with pytest.raises(ValueError, match="120 integer group ids"):
        dd.NoiseModel.fit(rows, labels, groups=ids[:5])
    with pytest.raises(ValueError, match="120 integer group ids"):
        dd.NoiseModel.fit(rows, labels, groups=ids.float())
    with pytest.raises(ValueError, match=r"groups= goes with inputs of shape \(rows, d\)"):
        dd.NoiseModel.fit(rows.view(30, 4, D), groups=torch.arange(30))
    with pytest.raises(ValueError, match="separate_means"):
        dd.NoiseModel.fit(rows, labels, groups=ids, separate_means=True)
    noise = dd.NoiseModel.fit(rows, labels, groups=ids)
    with pytest.raises(ValueError, match="rows of groups"):
        noise.of(torch.arange(4))
    # 1/1.09, less what the means of fifteen groups take of common noise.
    assert noise.units.correlation == pytest.approx(1 / 1.09, abs=1 / 15)
    assert f"30 units of 4 rows that correlate by {noise.units.correlation:.2f}" in str(noise)
