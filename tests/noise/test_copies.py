"""Copies among samples, told from coincidences and from neighbours."""

import pytest
import torch
from torch import nn

import dd
from dd.noise import copies
from dd.noise.copies import CopyWatch, count_copies
from dd.support.fingerprint import Fingerprints, fingerprint


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(seed, n, values):
    """Independent columns of as many values each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(v, (n,), generator=generator) for v in values], 1).float()


def counted(inputs):
    return count_copies(fingerprint(inputs), inputs.__getitem__)


def shuffled(inputs):
    return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))]


def test_exact_copies_are_counted():
    inputs = normal(0, 3000, 20)
    assert counted(inputs) == 0
    assert counted(shuffled(torch.cat([inputs, inputs[:10], inputs[:5]]))) == 15
    # Between two equal projections a third may lie.
    assert counted(torch.cat([inputs, inputs])) == pytest.approx(3000, rel=0.01)
    assert counted(inputs[:1]) == 0


def test_equal_fingerprints_alone_are_no_copies():
    inputs = normal(0, 300, 20)
    assert count_copies(torch.zeros(300, 3), inputs.__getitem__) == 0


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("values", [[3, 4, 2], [3] * 5, [2] * 8, [2, 3, 7, 4, 2]])
def test_coincidences_are_no_copies(values, one_hot):
    inputs = draws(0, 500, values)
    if one_hot:
        inputs = torch.cat([nn.functional.one_hot(c.long()) for c in inputs.T], 1).float()
    assert len(inputs.unique(dim=0)) < 0.8 * len(inputs)
    assert counted(inputs) == 0


def test_copies_of_rows_that_hardly_coincide_are_counted():
    """Of 17 columns of two values 10⁵ pairs coincide once, and a hundred are planted."""
    inputs = draws(0, 500, [2] * 17)
    assert counted(inputs) == 0
    assert counted(shuffled(torch.cat([inputs, inputs[:100]]))) == pytest.approx(100, abs=3)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("dimension", [6, 40])
def test_near_copies_are_counted(dimension, views):
    """Within four deviations of the share of 512 samples that are asked."""
    inputs = normal(0, 2000, dimension)
    near = inputs[:200].repeat(views, 1)
    noise = normal(2, *near.shape)
    near = near + 0.01 * noise * (near.norm(dim=1) / noise.norm(dim=1)).unsqueeze(1)
    everything = shuffled(torch.cat([inputs, near]))
    n, twins = len(everything), 200 * (views + 1)
    # A sample with v twins counts 1 − 1/(v + 1) where it is asked.
    deviation = n * (views / (views + 1)) * (twins / n * (1 - twins / n) / 512) ** 0.5
    assert counted(everything) == pytest.approx(200 * views, abs=4 * deviation)


@pytest.mark.parametrize("dimension", [1, 2, 3, 10])
def test_neighbours_are_no_copies(dimension):
    for inputs in (normal(0, 4000, dimension), normal(0, 4000, dimension).exp()):
        assert counted(inputs @ normal(1, dimension, max(dimension, 5))) == 0


def test_many_samples_are_asked_in_blocks(monkeypatch):
    inputs = normal(0, 900, 10)
    everything = torch.cat([inputs, inputs[:100] + 1e-3])
    expected = counted(everything)
    monkeypatch.setattr(copies, "_AT_A_TIME", 7000)
    assert counted(everything) == expected
    assert expected > 50


@pytest.mark.parametrize("room", [2**22, 40 * 20])
def test_a_first_pass_shows_copies(monkeypatch, room):
    """Of as many rows as are kept, and of the fingerprints of all."""
    monkeypatch.setattr(copies, "_KEPT", room)
    inputs = normal(0, 100, 20)
    inputs[60:70] = inputs[:10]
    known = Fingerprints(torch.full((100, 3), torch.nan))
    watch, found = CopyWatch(), []
    for rows in [*torch.randperm(100).split(30), torch.tensor([5, 5])]:
        new = rows[known.values[rows, 0].isnan()].unique()
        known.put(new, fingerprint(inputs[new]))
        found.append(watch.see(rows, inputs[rows], known))
    assert found == [None, None, None, None, 10]


def test_a_noise_model_knows_of_copies():
    inputs = normal(0, 300, 10)
    inputs[:30] = inputs[30:60]
    for noise in (dd.NoiseModel.fit(inputs), dd.NoiseModel.isotropic(inputs.numpy())):
        assert noise.copies == 30
        assert noise.to(torch.device("cpu"), torch.float64).copies == 30
        assert noise.of(torch.arange(10)).copies == 30


@pytest.mark.parametrize(
    "column",
    [torch.zeros(500, 1), (draws(3, 500, [30]) == 0).float(), draws(3, 500, [2])],
    ids=["constant", "rare", "even"],
)
def test_columns_of_few_values_hide_no_copies(column):
    """Rows that differ in all other columns are no draws of few values."""
    inputs = torch.cat([normal(0, 500, 10), column], 1)
    assert counted(inputs) == 0
    assert counted(shuffled(torch.cat([inputs, inputs[:60]]))) == 60


def test_no_more_coincidences_than_the_rarest_value_allows():
    inputs = draws(0, 400, [2, 2, 20])
    pairs = torch.cdist(inputs[:, 2:], inputs[:, 2:], p=0.0)
    equal = float((pairs == 0).sum() - 400) / (400 * 399)
    assert copies.coincidences(inputs) <= equal
    assert copies.coincidences(torch.ones(9, 3)) == 1.0
