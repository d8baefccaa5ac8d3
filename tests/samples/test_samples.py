"""Samples that could be mistaken, states that could go stale, and input that is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dd
from dd.noise.model import NoiseModel
from dd.watch.strain import StrainWarning

N, D, K, C = 60, 30, 4, 3


def make_problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % C
    means = torch.randn(C, D, generator=g)
    return means[labels] + torch.randn(N, D, generator=g), labels


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C))


def nameless(inputs):
    fitted = dd.NoiseModel.isotropic(inputs)
    return dd.NoiseModel(fitted.eigenvalues, fitted.multiplicities)


class Loop:
    """An optimizer with its data, and batches by their indices."""

    def __init__(self, noise=None, **settings):
        self.inputs, self.labels = make_problem()
        self.model = make_model()
        noise = dd.NoiseModel.isotropic(self.inputs) if noise is None else noise(self.inputs)
        self.optimizer = dd.DecoupledDescent(self.model, lr=0.3, noise=noise, **settings)

    def loss(self, rows):
        return F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows])

    def step(self, rows, scale=1.0):
        self.optimizer.zero_grad()
        self.loss(rows).backward()
        for p in self.model.parameters():
            p.grad *= scale
        self.optimizer.step()


ROWS = torch.arange(N).split(20)


def test_refilled_memory_is_another_batch():
    loop = Loop()
    for rows in ROWS * 3:
        loop.step(rows)
    memory = torch.empty(20, D)
    values = memory.numpy()

    def reused(rows):
        values[:] = loop.inputs[rows].numpy()
        return F.cross_entropy(loop.model(memory), loop.labels[rows])

    expected = loop.optimizer.evaluate(ROWS, loop.loss)
    torch.testing.assert_close(loop.optimizer.evaluate(ROWS, reused), expected)


def test_known_samples_are_looked_at_while_others_are_announced():
    loop = Loop(nameless)
    loop.optimizer.track(DataLoader(range(N)))
    for _ in range(3):
        loop.optimizer.batch(ROWS[0])
        loop.step(ROWS[0])
    expected = loop.optimizer.evaluate([ROWS[0]], loop.loss)
    with torch.no_grad():
        loop.model.eval()
        assert abs(loop.loss(ROWS[0]) - expected) > 1e-3
        loop.model.train()
    for rows in loop.optimizer.track([ROWS[1]]):
        torch.testing.assert_close(loop.optimizer.evaluate([ROWS[0]], loop.loss), expected)
        loop.step(rows)


def test_a_dropped_batch_gives_way_to_the_next():
    loop = Loop(nameless)
    data = TensorDataset(loop.inputs, loop.labels)
    for number, (x, y) in enumerate(loop.optimizer.track(DataLoader(data, 20))):
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model(x), y).backward()
        if number == 0:
            loop.optimizer.drop_forward()
            continue
        loop.optimizer.step()
    assert not loop.optimizer.shadow[:, :20].any()
    assert loop.optimizer.shadow[:, 20:].any()


def test_first_batches_told_are_not_the_noise_of_all():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    optimizer.batch(torch.arange(20))
    with pytest.raises(ValueError, match="does not show the noise"):
        F.cross_entropy(model(inputs[:20]), labels[:20])


def test_micro_batches_while_samples_come():
    loop = Loop(nameless)
    loop.optimizer.zero_grad()
    for rows in ROWS:
        loop.optimizer.batch(rows)
        (loop.loss(rows) / 3).backward()
    loop.optimizer.step()
    assert loop.optimizer.shadow.shape == (1, N, K)
    loop.optimizer.track(DataLoader(range(N)))


def test_of_copies_the_announcement_tells_which():
    loop = Loop()
    loop.inputs[30:] = loop.inputs[:30].clone()
    noise = dd.NoiseModel.isotropic(loop.inputs)
    loop.optimizer.detach()
    loop.optimizer.attach(loop.model, noise=noise)
    for rows in ROWS:
        loop.optimizer.batch(rows)
        loop.step(rows)
    assert bool((loop.optimizer.shadow[0] != 0).any(1).all())


def test_one_large_column_makes_nobody_known():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, D, generator=g)
    fresh = torch.randn(500, D, generator=g)
    for values in (inputs, fresh):
        values[:, 0] = 1000.0 * torch.randint(10, (len(values),), generator=g)
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=1e-6, noise=dd.NoiseModel.isotropic(inputs))
    F.cross_entropy(model(inputs[:50]), torch.arange(50) % C).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="500 of 500 samples"):
        model(fresh)


@pytest.mark.parametrize("components", [False, True])
def test_pooled_curvature_follows_the_scale_of_the_step(components):
    """H and G of one step are of one loss, whatever the scales of the steps before."""
    shadows = []
    for plan in ([1.0] * 12, [1.0] * 8 + [1e-3] * 4):
        loop = Loop(
            lambda x: dd.NoiseModel.isotropic(x, torch.arange(N) % C if components else None)
        )
        for step, scale in enumerate(plan):
            # Small steps stand for a scaled loss whose rate is raised as much.
            loop.optimizer.param_groups[0]["lr"] = 0.3 / scale
            loop.step(ROWS[step % 3], scale)
        shadows.append(loop.optimizer.shadow)
    torch.testing.assert_close(shadows[1], shadows[0], rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_the_latest_steps():
    loop = Loop(lambda x: dd.NoiseModel.isotropic(x, torch.arange(N) % C))
    loop.step(ROWS[0])
    before = loop.optimizer.state[loop.model[0].weight]["shadow_moments"].clone()
    loop.step(torch.arange(N))
    after = loop.optimizer.state[loop.model[0].weight]["shadow_moments"]
    assert float(before[0]) == 20
    assert float(after[0]) == N


def test_state_of_other_weights():
    loop = Loop()
    for rows in ROWS:
        loop.step(rows)
    twin = Loop()
    twin.optimizer.load_state_dict(loop.optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"changed outside step\(\)"):
        twin.loss(ROWS[0])
    twin.model.load_state_dict(loop.model.state_dict())
    twin.step(ROWS[0])


def test_state_of_another_estimator():
    loop = Loop()
    for rows in ROWS:
        loop.step(rows)
    twin = Loop(lambda x: dd.NoiseModel.isotropic(x, torch.arange(N) % C))
    twin.model.load_state_dict(loop.model.state_dict())
    twin.optimizer.load_state_dict(loop.optimizer.state_dict())
    twin.step(ROWS[0])


def test_momentum_of_idle_steps_is_no_momentum():
    loop = Loop(momentum=0.9)
    for p in loop.model.parameters():
        p.grad = torch.zeros_like(p)
    loop.optimizer.step()
    loop.step(ROWS[0])


def test_curvature_that_overflows_leaves_nothing_behind():
    loop = Loop(lambda x: dd.NoiseModel.isotropic(x, torch.arange(N) % C))
    loop.step(ROWS[0])
    kept = loop.optimizer.state[loop.model[0].weight]["shadow_moments"].clone()
    loop.optimizer.zero_grad()
    loop.loss(ROWS[1]).backward()
    capture = loop.optimizer._attachment.pending[0]
    capture._observed = torch.full_like(capture._observed, torch.inf)
    with pytest.raises(FloatingPointError, match="curvature at layer '0' is not finite"):
        loop.optimizer.step()
    loop.optimizer.drop_forward()
    assert torch.equal(kept, loop.optimizer.state[loop.model[0].weight]["shadow_moments"])
    loop.step(ROWS[1])


@pytest.mark.parametrize("indices", [["a"], None, object()])
def test_indices_of_another_kind(indices):
    with pytest.raises(ValueError, match="integer indices"):
        Loop().optimizer.batch(indices)


def test_process_group_that_is_none():
    with pytest.raises(ValueError, match="process_group must be"):
        dd.DecoupledDescent(make_model(), lr=0.1, process_group=True)


def test_noise_of_some_samples():
    inputs, labels = make_problem()
    noise = dd.NoiseModel.fit(inputs, labels, per_sample=True)
    some = noise.of(torch.tensor([5, 3, 8], dtype=torch.uint8))
    assert some.components.tolist() == labels[[5, 3, 8]].tolist()
    assert torch.equal(some.relative_mass, noise.relative_mass[[5, 3, 8]])
    assert torch.equal(some.eigenvalues, noise.eigenvalues)
    assert some.num_samples == 3
    for rows in ([0, 3], [-1], [], [0.5], [[1]], [True, False, True]):
        with pytest.raises(ValueError, match=r"NoiseModel: expected .*indices"):
            some.of(torch.tensor(rows))


def test_copies_keep_one_shadow_whatever_the_order_of_a_pass():
    """A pass in order must read the shadows that shuffled training moved."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 6, generator=g).repeat(2, 1)
    labels = (torch.arange(20) % 2).repeat(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StrainWarning)
        noise = NoiseModel.isotropic(inputs, labels)
        optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise)
        found = []
        for epoch in range(4):
            order = torch.arange(40) if epoch == 0 else torch.randperm(40, generator=g)
            for rows in order.split(10):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
        for order in (torch.arange(40), torch.randperm(40, generator=g)):
            batches = [(inputs[rows], labels[rows]) for rows in order.split(10)]
            found.append(optimizer.evaluate(batches, lambda b: F.cross_entropy(model(b[0]), b[1])))
    torch.testing.assert_close(found[0], found[1])


def test_a_batch_without_samples_is_refused():
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = dd.DecoupledDescent(model, lr=0.5, noise=NoiseModel.isotropic(inputs))
    with pytest.raises(RuntimeError, match="without samples"):
        model(inputs[:0])
    optimizer.detach()
