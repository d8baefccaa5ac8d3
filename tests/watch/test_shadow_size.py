"""How large shadows may be, and what is said where they are larger."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.attachment import Attachment
from dd.data import xor
from dd.watch import model_watch, shadow_size
from dd.watch.shadow_size import ShadowSizeWatch, largest_shadow_ratio, shares

D = 300


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(inputs, labels, steps, scale, lr=0.5, noise=None):
    """Shares |Q|/|R| after every step of a small network with a fixed head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 4, bias=False), nn.GELU(), nn.Linear(4, 2))
    model = model.double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[2].weight.normal_()
        model[2].bias.zero_()
    model[2].requires_grad_(False)
    noise = noise or dd.NoiseModel.isotropic(inputs)
    optimizer = dd.DecoupledDescent(model, lr=lr, noise=noise)
    rows = []
    model[1].register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        with torch.no_grad():
            model(inputs)
        found.append(float(shares(optimizer.shadow.sum(0)[None], rows[-1][None])))
    return found, optimizer


# --- What the theory allows -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_shadows_of_noise_are_as_large_as_the_theory_says(ratio):
    """‖q‖² = (d/n) tr Cov(r) where W⁰ is forgotten and labels are noise.

    At first all units have one direction in W, of d normal numbers, and R is that of n samples:
    its size is known to a share of (1/2d + 1/2n)^1/2 < 0.036. Three of these are allowed.
    """
    d = 800
    n, g = ratio * d, torch.Generator().manual_seed(ratio)
    found, _ = trained(normal(n, d, seed=5), torch.randint(2, (n,), generator=g), 12, scale=1e-3)
    expected = 1 / math.sqrt(ratio)
    off = 3 * math.sqrt(1 / (2 * d) + 1 / (2 * n))
    assert found == pytest.approx([expected] * len(found), rel=off)


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("labels", ["xor", "noise"])
def test_a_run_that_goes_well_stays_below_the_limit(ratio, labels):
    """No warning either: warnings are errors here."""
    split = xor(dimension=D, num_train=ratio * D, seed=1)
    inputs, targets = split.train_inputs.double(), split.train_targets
    if labels == "noise":
        inputs = normal(len(inputs), D, seed=5)
        targets = torch.randint(2, targets.shape, generator=torch.Generator().manual_seed(5))
    found, optimizer = trained(inputs, targets, steps=40, scale=1.0)
    assert max(found) < largest_shadow_ratio(optimizer.noise, len(inputs))
    # Of a signal R alone grows.
    assert labels == "noise" or max(found) < 1 / math.sqrt(ratio)
    assert optimizer._attachment.oversight.doubts == ()


def test_the_limit_is_the_theory_and_a_margin():
    inputs = normal(400, 100)
    noise = dd.NoiseModel.isotropic(inputs)
    assert largest_shadow_ratio(noise, 400) == pytest.approx(1.5 * 0.5)
    # It is of all dimensions, whatever their bins.
    bins = dd.NoiseModel(torch.tensor([4.0, 1.0]), torch.tensor([20, 80]))
    assert largest_shadow_ratio(bins, 400) == pytest.approx(1.5 * 0.5)
    # Masses 2 and 0 in equal parts have a root mean square of √2.
    mass = torch.tensor([2.0, 0.0], dtype=torch.float64).repeat(800)
    wide = replace(noise, relative_mass=mass)
    assert largest_shadow_ratio(wide, 1600) == pytest.approx(1.5 * 0.25 * math.sqrt(2))
    assert largest_shadow_ratio(noise, 100) == 0.9
    assert largest_shadow_ratio(noise, 10) == 0.9


# --- The watch --------------------------------------------------------------------------------


def test_the_share_is_that_of_all_bins_against_the_spread():
    rows, bins = normal(500, 3) + 7.0, normal(2, 500, 3, seed=1)
    watch = ShadowSizeWatch()
    spread = float(rows.var(0).sum())
    expected = math.sqrt(float(bins.sum(0).square().sum(1).mean()) / spread)
    assert not watch.look(bins.sum(0), rows, expected * 1.001, 500)
    assert watch.look(bins.sum(0), rows, expected * 0.999, 500)
    assert watch.found == pytest.approx(expected, rel=1e-12)
    assert float(shares(bins.sum(0)[None], rows[None])) == pytest.approx(expected, rel=1e-12)


def test_it_is_told_once():
    rows = normal(300, 3)
    watch = ShadowSizeWatch()
    assert watch.look(rows, rows, 0.5, 300)
    assert not watch.look(5 * rows, rows, 0.5, 300)
    assert watch.found == pytest.approx(1.0, rel=0.01)


def test_of_many_rows_some_are_looked_at():
    """Every third of 5000; the others would show far too much."""
    rows, shadow = normal(5000, 2), torch.full((1, 5000, 2), 9.0, dtype=torch.float64)
    shadow[:, ::3] = 0.1
    watch = ShadowSizeWatch()
    assert not watch.look(shadow[0], rows, 0.5, 5000)
    assert float(shares(shadow, rows[None])) == pytest.approx(0.1, rel=0.05)


def test_mini_batches_accumulate():
    """Eight batches of 32 rows are one look, in which one wild batch is an eighth."""
    watch = ShadowSizeWatch()
    for number in range(8):
        rows = normal(32, 4, seed=number)
        size = 2.0 if number == 0 else 0.1
        assert not watch.look(size * rows, rows, 0.9, 10_000)
    assert watch.found is None
    for number in range(8):
        rows = normal(32, 4, seed=number)
        assert watch.look(1.5 * rows, rows, 0.9, 10_000) == (number == 7)
    assert watch.found == pytest.approx(1.5, rel=0.02)


def test_fewer_samples_than_a_look_takes_are_looked_at_together():
    watch, rows = ShadowSizeWatch(), normal(20, 4)
    assert not watch.look(rows, rows, 0.5, 40)
    assert watch.look(rows, rows, 0.5, 40)


@pytest.mark.parametrize(
    ("shadow", "preactivation", "found"),
    [(0.0, 0.0, None), (0.5, 0.0, math.inf), (math.nan, 1.0, None), (0.1, math.nan, None)],
    ids=["a layer at zero", "shadows alone", "no number", "no number either"],
)
def test_what_has_no_share(shadow, preactivation, found):
    watch, rows = ShadowSizeWatch(), normal(300, 3)
    assert watch.look(shadow * rows, preactivation * rows, 0.9, 300) == (found is not None)
    assert watch.found == found
    # What came before leaves nothing behind.
    if found is None:
        assert watch.look(rows, rows, 0.9, 300)
    batched = float(shares(shadow * rows[None], preactivation * rows[None]))
    assert (batched > 0.9) == (found is not None)


def test_one_sample_has_no_share():
    watch, rows = ShadowSizeWatch(), normal(1, 3)
    assert not watch.look(rows, rows, 0.1, 300)
    assert shares(rows[None], rows[None]).isnan().all()


def test_what_was_found_is_saved():
    rows = normal(300, 3)
    one, other = ShadowSizeWatch(), ShadowSizeWatch()
    other.load_state_dict(one.state_dict())
    assert other.look(rows, rows, 0.5, 300)
    one.load_state_dict(other.state_dict())
    assert one.found == other.found
    assert not one.look(rows, rows, 0.5, 300)


# --- End to end -------------------------------------------------------------------------------


def heavy_table(seed, n=1400, d=20):
    """Columns that share three log-normal causes: neither Gaussian, nor of full rank."""
    causes = normal(n, 3, seed=seed).exp()
    inputs = causes @ normal(3, d, seed=seed + 1000) + 0.1 * normal(n, d, seed=seed + 2000)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return inputs, (inputs[:, 0] - inputs[:, 1] + normal(n, seed=seed + 3000) > 0).long()


@torch.no_grad()
def error_of(model, inputs, labels):
    return float((model.eval()(inputs).argmax(1) != labels).double().mean())


def fitted(inputs, labels, steps=300, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 8), nn.ReLU(), nn.Linear(8, 2)).double()
    noise = dd.NoiseModel.fit(inputs, labels)
    settings = {"lr": 0.05, "momentum": 0.9, "noise": noise} | settings
    optimizer = dd.DecoupledDescent(model, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    wrong = optimizer.estimate(
        [(inputs, labels)], lambda batch: (model(batch[0]).argmax(1) != batch[1]).double()
    )
    kinds = {each.category for each in said} & {dd.ShadowWarning, dd.CurvatureWarning}
    return kinds, wrong, said, model


@pytest.mark.parametrize("seed", [2, 3])
def test_steins_curvature_on_a_heavy_tailed_table_is_not_believed_and_the_default_is(seed):
    inputs, labels = heavy_table(seed)
    train, test = (inputs[:400], labels[:400]), (inputs[400:], labels[400:])
    kinds, wrong, said, model = fitted(*train, curvature="stein")
    assert kinds == {dd.ShadowWarning, dd.CurvatureWarning}
    (size,) = [str(each.message) for each in said if each.category is dd.ShadowWarning]
    assert "the training error is not to be believed from here on" in size
    assert "Stein's curvature is not that of the loss." in wrong.doubts
    assert any("The shadows grew to" in doubt for doubt in wrong.doubts)
    assert "not to be believed: Stein's" in str(wrong)
    # It is not: the interval ends far below the test error.
    assert float(wrong.upper) < error_of(model, *test) - 0.04

    kinds, wrong, _, model = fitted(*train)
    assert (kinds, wrong.doubts) == (set(), ())
    assert "believed" not in str(wrong)
    assert float(wrong.upper) > error_of(model, *test)


@pytest.mark.parametrize("table", ["breast_cancer", "diabetes"])
def test_steins_curvature_on_public_tables(table):
    """Of the inputs as one component, which they are not, each is found out at once."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = getattr(datasets, f"load_{table}")()
    inputs, targets = torch.tensor(found.data), torch.tensor(found.target)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    labels = (targets > targets.double().median()).long() if table == "diabetes" else targets.long()
    one = dd.NoiseModel.fit(inputs, torch.zeros_like(labels))
    kinds, wrong, *_ = fitted(inputs, labels, 100, curvature="stein", noise=one)
    assert dd.CurvatureWarning in kinds
    assert wrong.doubts
    kinds, wrong, *_ = fitted(inputs, labels, 100)
    assert (kinds, wrong.doubts) == (set(), ())


@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
def test_an_accelerator_is_waited_for_where_something_is_measured(monkeypatch):
    """Between the forwards that are looked at by their number nothing is, but an estimate is."""
    inputs, labels = normal(100, 12), torch.arange(100) % 2
    monkeypatch.setattr(shadow_size, "MOST", 1e-6)
    model = nn.Sequential(nn.Linear(12, 3), nn.GELU(), nn.Linear(3, 2)).double()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=dd.NoiseModel.isotropic(inputs))
    monkeypatch.setattr(Attachment, "stalls", property(lambda self: True))
    monkeypatch.setattr(model_watch, "is_due", lambda forward: False)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    watch = optimizer._attachment.oversight
    assert watch.doubts == ()
    found = optimizer.estimate([(inputs, labels)], lambda batch: model(batch[0])[:, 0])
    assert found.doubts == watch.doubts != ()
