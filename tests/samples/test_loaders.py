"""Loaders, index lists and announcements: which samples a batch holds, and what is said if not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import dd

N, D, K, C = 24, 8, 3, 2


def make_problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % C
    means = 2 * torch.randn(C, D, generator=g).double()
    return means[labels] + torch.randn(N, D, generator=g).double(), labels


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()


def nameless_noise(inputs):
    """A noise model that does not know the samples, so that only indices tell."""
    fitted = dd.NoiseModel.isotropic(inputs)
    return dd.NoiseModel(fitted.eigenvalues, fitted.multiplicities)


class Records(Dataset):
    """Samples as dictionaries, with the answer to which one they are."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return {"x": self.inputs[i], "y": self.labels[i], "i": i}


class FetchedTogether(Records):
    """Samples that are read many at a time."""

    def __getitems__(self, indices):
        return [super(FetchedTogether, self).__getitem__(i) for i in indices]


def loaders(dataset):
    g = torch.Generator().manual_seed(3)
    plain = SequentialSampler(dataset)
    return {
        "shuffled": DataLoader(dataset, 5, shuffle=True, generator=g),
        "last dropped": DataLoader(dataset, 5, shuffle=True, drop_last=True, generator=g),
        "sampler": DataLoader(dataset, 7, sampler=RandomSampler(dataset, generator=g)),
        "with replacement": DataLoader(
            dataset, 6, sampler=WeightedRandomSampler(torch.ones(N), N, generator=g)
        ),
        "batch sampler": DataLoader(dataset, batch_sampler=BatchSampler(plain, 4, False)),
        "unbatched": DataLoader(
            dataset, batch_size=None, sampler=BatchSampler(plain, 6, False), collate_fn=gathered
        ),
        "workers": DataLoader(dataset, 5, shuffle=True, generator=g, num_workers=2),
        "persistent workers": DataLoader(
            dataset, 5, shuffle=True, generator=g, num_workers=1, persistent_workers=True
        ),
    }


def gathered(batch):
    return batch


class Lists(Records):
    """A data set that is asked for whole batches."""

    def __getitem__(self, indices):
        return {"x": self.inputs[indices], "y": self.labels[indices], "i": torch.tensor(indices)}


def placed(optimizer):
    now = optimizer._attachment.now
    return torch.arange(N) if now.index is None else now.index


@pytest.mark.parametrize("kind", [Records, FetchedTogether])
@pytest.mark.parametrize("name", list(loaders(range(N))))
def test_every_row_meets_its_own_shadow(name, kind):
    inputs, labels = make_problem()
    dataset = (Lists if name == "unbatched" else kind)(inputs, labels)
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    loader = optimizer.track(loaders(dataset)[name])
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch["x"]), batch["y"]).backward()
            assert torch.equal(placed(optimizer), torch.as_tensor(batch["i"]))
            optimizer.step()
    assert optimizer.shadow.shape == (1, N, K)


@pytest.mark.parametrize("name", list(loaders(range(N))))
def test_batches_come_as_they_would_have(name):
    inputs, labels = make_problem()
    dataset = (Lists if name == "unbatched" else Records)(inputs, labels)
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1, noise=nameless_noise(inputs))
    torch.manual_seed(0)
    plain = loaders(dataset)[name]
    expected = list(plain)
    torch.manual_seed(0)
    tracked = optimizer.track(loaders(dataset)[name])
    found = list(tracked)
    assert len(tracked) == len(plain)
    assert tracked.batch_size == plain.batch_size
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


def test_tuples_and_subsets():
    inputs, labels = make_problem()
    subset = Subset(TensorDataset(inputs, labels), list(range(20, 4, -1)))
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    for x, y in optimizer.track(DataLoader(subset, 4, shuffle=True)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert torch.equal(inputs[20 - placed(optimizer)], x)
        optimizer.step()
    assert optimizer.shadow.shape == (1, 16, K)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_lists_of_indices():
    inputs, labels = make_problem()
    models = []
    for told in ("track", "batch", "content"):
        model = make_model()
        noise = dd.NoiseModel.isotropic(inputs) if told == "content" else nameless_noise(inputs)
        optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, momentum=0.5)
        if told != "content":
            optimizer.track(DataLoader(range(N)))
        plan = [list(range(a, a + 6)) for a in (0, 6, 12, 18, 3, 9, 15, 0)]
        for batch in optimizer.track(plan) if told == "track" else plan:
            if told == "batch":
                optimizer.batch(torch.tensor(batch))
            step(model, optimizer, inputs[batch], labels[batch])
        models.append(model)
    for model in models[1:]:
        torch.testing.assert_close(model[0].weight, models[0][0].weight, rtol=1e-12, atol=0)


def test_samples_beyond_those_seen_get_a_shadow():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs), momentum=0.5)
    for first in (0, 4, 8, 0, 12, 16, 2, 20):
        batch = torch.arange(first, first + 4)
        optimizer.batch(batch)
        step(model, optimizer, inputs[batch], labels[batch])
    assert optimizer.shadow.shape[1] >= N
    assert bool((optimizer.shadow[0, :N] != 0).all())


def test_several_announcements_are_told_apart_by_what_is_known():
    """As under a wrapper that fetches a batch ahead."""
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    plan = torch.arange(N).split(6)
    for batch in optimizer.track(plan):
        step(model, optimizer, inputs[batch], labels[batch])
    ahead = list(optimizer.track(plan[::-1]))
    for batch in ahead:
        step(model, optimizer, inputs[batch], labels[batch])
        assert torch.equal(placed(optimizer), batch)


def test_new_samples_under_several_announcements_cannot_be_placed():
    inputs, _ = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    ahead = list(optimizer.track(torch.arange(N).split(6)))
    with pytest.raises(RuntimeError, match=r"4 batches were announced.*fetches ahead.*batch\("):
        model(inputs[ahead[0]])


def test_batch_that_was_not_announced():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    optimizer.batch(torch.arange(6))
    with pytest.raises(RuntimeError, match=r"7 rows was not announced \(announced: \[6\]"):
        model(inputs[:7])
    step(model, optimizer, inputs[:6], labels[:6])
    with pytest.raises(RuntimeError, match=r"not announced.*optimizer.batch\(indices\)"):
        model(inputs[6:12])
    with torch.no_grad(), pytest.raises(RuntimeError, match="not announced"):
        model(inputs[6:12])
    model.eval()
    model(inputs[6:12])


def test_announced_batch_may_be_looked_at_and_dropped():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    optimizer.batch(torch.arange(6))
    with torch.no_grad():
        model(inputs[:6])
    model(inputs[:6])
    optimizer.drop_forward()
    step(model, optimizer, inputs[:6], labels[:6])


def test_announcing_another_samples_input():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    optimizer.track(DataLoader(range(N)))
    optimizer.batch(torch.arange(6))
    step(model, optimizer, inputs[:6], labels[:6])
    optimizer.batch(torch.arange(6))
    with pytest.raises(RuntimeError, match=r"announces sample 0, but holds .* sample 1: 6 of 6"):
        model(inputs[:6].roll(-1, 0))


def one_pass(model, optimizer, batches, inputs, labels):
    for batch in batches:
        step(model, optimizer, inputs[batch], labels[batch])


@pytest.mark.parametrize("known", [False, True])
def test_augmented_inputs_are_told_once(known):
    inputs, labels = make_problem()
    model = make_model()
    noise = dd.NoiseModel.isotropic(inputs) if known else nameless_noise(inputs)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    batches = optimizer.track(torch.arange(N).split(8))
    for batch in batches:
        step(model, optimizer, inputs[batch], labels[batch])
    g = torch.Generator().manual_seed(1)
    noisy = inputs + 0.1 * torch.randn(N, D, generator=g).double()
    with pytest.warns(dd.AugmentationWarning, match=r"8 of 8 samples.*Augmentation") as told:
        one_pass(model, optimizer, batches, noisy, labels)
    assert len(told) == 1


def test_augmentation_without_announcements_is_an_error():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=dd.NoiseModel.isotropic(inputs))
    step(model, optimizer, inputs[:5], labels[:5])
    with pytest.raises(RuntimeError, match="unaugmented"):
        model(inputs[:5] + 0.1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "error", "match"),
    [
        (DataLoader(Stream()), ValueError, "map-style dataset.*Stream streams them"),
        (
            DataLoader(range(N), sampler=DistributedSampler(range(N), num_replicas=2, rank=0)),
            ValueError,
            r"shuffle=True\) hands a sample to another process",
        ),
        (
            DataLoader(
                range(N),
                sampler=DistributedSampler(range(N - 1), num_replicas=2, rank=0, shuffle=False),
            ),
            ValueError,
            "drop_last=True",
        ),
        (iter([[1, 2]]), TypeError, "sized iterable of batches"),
        (3, TypeError, "got int"),
    ],
)
def test_loaders_that_cannot_be_tracked(loader, error, match):
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1)
    with pytest.raises(error, match=match):
        optimizer.track(loader)


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (torch.rand(3), "integer indices"),
        (torch.ones(3, dtype=torch.bool), "integer indices"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(2, 2\)"),
        ([], "integer indices"),
        ([-1, 2], "from 0; got -1 to 2"),
    ],
)
def test_indices_that_are_none(indices, match):
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.batch(indices)


def test_index_beyond_the_noise_model_or_the_loader():
    inputs, _ = make_problem()
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1, noise=dd.NoiseModel.isotropic(inputs))
    optimizer.track(DataLoader(range(N)))
    with pytest.raises(ValueError, match=rf"count the {N} samples from 0; got 3 to {N}"):
        optimizer.batch([3, N])
    with pytest.raises(ValueError, match=rf"{N + 1} training samples are announced.*has {N}"):
        optimizer.track(DataLoader(range(N + 1)))


@pytest.mark.parametrize("call", ["track", "batch", "evaluate"])
def test_unattached(call):
    optimizer = dd.DecoupledDescent(make_model().parameters(), lr=0.1)
    arguments = ([], None) if call == "evaluate" else ([[0]],)
    with pytest.raises(ValueError, match=rf"{call}\(\) needs an attached optimizer"):
        getattr(optimizer, call)(*arguments)


def test_tracked_twice():
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1)
    with pytest.raises(ValueError, match="tracked already"):
        optimizer.track(optimizer.track([[0, 1]]))


def test_mini_batches_without_a_noise_model():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    optimizer.track(DataLoader(range(N)))
    optimizer.batch(torch.arange(6))
    with pytest.raises(ValueError, match=r"does not show the noise.*NoiseModel.fit\(inputs"):
        model(inputs[:6])
    optimizer.batch(torch.arange(N).flip(0))
    step(model, optimizer, inputs.flip(0), labels.flip(0))
    expected = dd.NoiseModel.fit(inputs)
    torch.testing.assert_close(optimizer.noise.eigenvalues, expected.eigenvalues)


# --- The tracked loss over all samples -------------------------------------------------------


def test_evaluate_is_the_full_batch_loss_and_changes_nothing():
    inputs, labels = make_problem()
    model = nn.Sequential(make_model()[0], nn.BatchNorm1d(K), nn.Dropout(0.5), nn.Linear(K, C))
    model = model.double()
    noise = dd.NoiseModel.isotropic(inputs)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    for batch in [b for _ in range(3) for b in torch.arange(N).split(7)]:
        step(model, optimizer, inputs[batch], labels[batch])
    statistics = model[1].running_mean.clone()

    def loss(batch):
        scores = model(inputs[batch])
        return torch.stack(
            [
                F.cross_entropy(scores, labels[batch]),
                (scores.argmax(1) != labels[batch]).double().mean(),
            ]
        )

    pieces = optimizer.evaluate(torch.arange(N).split(5), loss)
    whole = optimizer.evaluate([torch.arange(N)], loss)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    assert torch.equal(statistics, model[1].running_mean)
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        plain = float(loss(torch.arange(N))[0])
    assert plain != pytest.approx(float(whole[0]), abs=1e-4)
    model.train()
    step(model, optimizer, inputs[:7], labels[:7])


def test_evaluate_over_a_tracked_loader_in_the_middle_of_an_epoch():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=nameless_noise(inputs))
    loader = optimizer.track(DataLoader(TensorDataset(inputs, labels), 6, shuffle=True))
    for x, y in loader:
        step(model, optimizer, x, y)
    values = []
    for number, (x, y) in enumerate(loader):
        step(model, optimizer, x, y)
        if number == 1:
            values = [
                optimizer.evaluate(loader, lambda b: F.cross_entropy(model(b[0]), b[1]))
                for _ in range(2)
            ]
            break
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)


def test_evaluate_that_never_meets_the_layer():
    optimizer = dd.DecoupledDescent(make_model(), lr=0.1)
    with pytest.raises(RuntimeError, match="did not pass through layer '0'"):
        optimizer.evaluate([1], lambda _: torch.zeros(()))
    with pytest.raises(ValueError, match="no batches"):
        optimizer.evaluate([], lambda _: torch.zeros(()))
