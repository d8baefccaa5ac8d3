"""Warnings of strained sizes, and the line that is logged with them."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.watch.strain import means_strain_message, strain_messages
from tests.closures import closure_of


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((150, 200, 20, 37, 1), None),
        ((149, 200, 9, 37, 0), "n/d = 0.74"),
        ((99, 100, 20, 24, 0), "k²/n = 4.04"),
        ((100, 100, 10, 26, 0), "0.26 a sample"),
        ((100, 100, 10, 25, 2), "2 of 100 samples are copies"),
    ],
)
def test_each_ratio_has_its_sentence(sizes, message):
    found = strain_messages(*sizes)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_what_is_corrected_may_be_more_but_not_any_number():
    assert strain_messages(100, 50, 4, 0, 0, corrected=100) == []
    (found,) = strain_messages(100, 50, 4, 0, 0, corrected=101)
    assert "1 a sample) are corrected" in found


def test_tails_matter_where_shadows_do():
    assert strain_messages(500, 50, 4, 0, 0, ignores_heavy_tails=True) == []
    (found,) = strain_messages(499, 50, 4, 0, 0, ignores_heavy_tails=True)
    assert "to either side" in found


def test_a_search_may_follow_half_of_the_dimensions_along_means():
    assert means_strain_message(8, 16) is None
    found = means_strain_message(9, 16)
    assert found is not None
    assert "span 9 of 16 dimensions" in found


@pytest.mark.parametrize(("classes", "warnings_told"), [(2, 0), (3, 1)])
def test_a_search_along_many_means_is_told_once(classes, warnings_told):
    """Means of 2 classes, not centred, span 2 of 5 dimensions, of 3 classes 3."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % classes
    inputs = 3 * torch.eye(5)[labels] + torch.randn(200, 5, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes))
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr="auto", noise=noise, head=True)
    closure = closure_of(model, optimizer, inputs, labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(closure)
        optimizer.step(closure)
    strained = [w for w in caught if w.category is dd.StrainWarning]
    assert len(strained) == warnings_told
    assert all("component means span 3 of 5" in str(w.message) for w in strained)


def problem(n: int):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, torch.randn(n, 30, generator=generator), torch.arange(n) % 2


def test_the_optimizer_warns_once_at_the_first_training_forward():
    model, inputs, targets = problem(14)
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    model.eval()(inputs)
    model.train()
    with pytest.warns(dd.StrainWarning) as caught:
        loss = F.cross_entropy(model(inputs), targets)
    # 14 samples of 30 inputs, 3 + 6 + 2 parameters beside the weight, and 3 weights along the
    # difference of two classes; k² is 9.
    few, large = (str(w.message) for w in caught if w.category is dd.StrainWarning)
    assert "14 samples of dimension 30" in few
    assert "14 parameters" in large
    assert {w.filename for w in caught if w.category is dd.StrainWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", dd.StrainWarning)
        loss.backward()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("given", [True, False])
def test_the_noise_model_is_logged(given, caplog):
    model, inputs, targets = problem(60)
    noise = dd.NoiseModel.isotropic(inputs, targets) if given else None
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    with caplog.at_level(logging.INFO, logger="dd"):
        model(inputs)
    assert [r.name for r in caplog.records] == ["dd"]
    assert caplog.messages[0] == str(optimizer.noise)
    assert caplog.messages[0].startswith("noise model: 1 bin, effective rank 30 of 30, n/d 2,")


def test_copies_warn():
    model, inputs, targets = problem(60)
    inputs[5] = inputs[7]
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with pytest.warns(dd.StrainWarning, match="1 of 60 samples are copies"):
        F.cross_entropy(model(inputs), targets)
    optimizer.detach()


@pytest.mark.parametrize("given", [True, False])
def test_copies_in_mini_batches_warn_at_the_end_of_the_first_pass(given):
    """At once where the noise model was fitted on all samples."""
    model, inputs, targets = problem(60)
    inputs[:6] = inputs[-6:]
    noise = dd.NoiseModel.isotropic(inputs)
    if not given:
        noise = dd.NoiseModel(noise.eigenvalues, noise.multiplicities)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    warned = []
    for number, rows in enumerate(torch.arange(60).split(15) * 2):
        optimizer.batch(rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        warned += [number for w in caught if "6 of 60 samples are copies" in str(w.message)]
    assert warned == [0 if given else 4]


@pytest.mark.parametrize("per_sample", [True, False])
def test_one_mass_for_heavy_tails_warns(per_sample):
    model, inputs, targets = problem(200)
    generator = torch.Generator().manual_seed(1)
    inputs = inputs * torch.rand(200, 1, generator=generator).sqrt().reciprocal()
    noise = dd.NoiseModel.fit(inputs, targets, bins=1, per_sample=per_sample)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.cross_entropy(model(inputs), targets)
    found = [w for w in caught if "noise norms vary" in str(w.message)]
    assert len(found) == (not per_sample)
    assert optimizer.noise is not None
    assert optimizer.noise.ignores_heavy_tails == (not per_sample)
