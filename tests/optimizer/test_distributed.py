"""Two processes that share the samples are one process that has them all."""

import datetime
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dd
from dd.curvature.estimators import Exact, Rows
from dd.support.ranks import Ranks
from tests.reference import kinks_of

N, D, K, C, WORLD = 40, 12, 3, 4, 2


def make_problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    means = torch.randn(C, D, generator=g).double()
    return means[labels] + torch.randn(N, D, generator=g).double(), labels


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()


def shard(rank):
    return torch.arange(rank, N, WORLD)


def batches(rank, m, steps):
    """Rows of the whole training set that a rank draws in each step from its own."""
    if m is None:
        # One in the order of its samples, the others not.
        return [shard(rank).roll(rank)] * steps
    g = torch.Generator().manual_seed(5 + rank)
    rows = [torch.randperm(N // WORLD, generator=g).split(m) for _ in range(steps)]
    return [shard(rank)[part] for epoch in rows for part in epoch][:steps]


def train(model, optimizer, inputs, labels, plan, micro=1):
    for rows in plan:
        optimizer.zero_grad()
        for part in rows.chunk(micro):
            loss = F.cross_entropy(model(inputs[part]), labels[part])
            (loss * len(part) / len(rows)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()


SETTINGS = {
    "full batch": {},
    "mini-batch": {"m": 4},
    "momentum": {"m": 5, "momentum": 0.8, "weight_decay": 0.1},
    "micro-batches": {"m": 10, "micro": 2},
    "head": {"head": True},
    "head, mini-batch": {"head": True, "m": 5},
}


def build(model, setting, inputs, labels, rows=None, **others):
    head = setting.get("head", False)
    noise = dd.NoiseModel.fit(inputs, labels, bins=3, separate_means=head)
    noise = noise if rows is None else noise.of(rows)
    options = {k: v for k, v in setting.items() if k in {"momentum", "weight_decay"}}
    # Processes draw probes of their own, one process draws others.
    others = {"curvature": "stein"} | others
    return dd.DecoupledDescent(model, lr=0.3, noise=noise, head=head, **options, **others)


def single(setting, steps=12):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = build(model, setting, inputs, labels)
    plans = [batches(rank, setting.get("m"), steps) for rank in range(WORLD)]
    train(
        model, optimizer, inputs, labels, [torch.cat(parts) for parts in zip(*plans, strict=True)]
    )
    optimizer.state_dict()
    return [p.detach() for p in model.parameters()], optimizer.shadow


def shared(rank, setting, steps=12):
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    optimizer = build(parallel, setting, inputs, labels, shard(rank))
    plan = batches(rank, setting.get("m"), steps)
    train(parallel, optimizer, inputs, labels, plan, setting.get("micro", 1))
    optimizer.state_dict()
    mean = optimizer.evaluate(
        [shard(rank)], lambda b: F.cross_entropy(parallel(inputs[b]), labels[b])
    )
    return [p.detach() for p in parallel.parameters()], optimizer.shadow, mean


def wandering(rank, setting):
    """Every rank knows all samples, and each step's are dealt to the ranks anew."""
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    optimizer = build(parallel, setting, inputs, labels)
    plan = [rows[rank::WORLD] for rows in dealt()]
    train(parallel, optimizer, inputs, labels, plan)
    optimizer.state_dict()
    return [p.detach() for p in parallel.parameters()], optimizer.shadow


def dealt():
    g = torch.Generator().manual_seed(9)
    return [rows for _ in range(4) for rows in torch.randperm(N, generator=g).split(10)]


def different_noise(rank):
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    noise = dd.NoiseModel.isotropic(inputs[shard(rank)], labels[shard(rank)])
    optimizer = dd.DecoupledDescent(parallel, lr=0.3, noise=noise)
    try:
        train(parallel, optimizer, inputs, labels, [shard(rank)])
    except ValueError as error:
        return str(error)
    return ""


def unwrapped_afterwards(rank):
    """Constructed with the bare module, wrapped later, as many libraries do."""
    inputs, labels = make_problem()
    model = make_model()
    optimizer = build(model, {}, inputs, labels, shard(rank))
    train(DistributedDataParallel(model), optimizer, inputs, labels, [shard(rank)] * 12)
    return [p.detach() for p in model.parameters()], optimizer.shadow


def other_order(rank):
    """All samples are known to both processes, in different orders."""
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    noise = dd.NoiseModel.isotropic(inputs, labels)
    noise = noise.of(torch.arange(N).flip(0)) if rank else noise
    optimizer = dd.DecoupledDescent(parallel, lr=0.3, noise=noise)
    try:
        train(parallel, optimizer, inputs, labels, [shard(rank)])
    except RuntimeError as error:
        return str(error)
    return ""


def wandering_untold(rank):
    """Each process knows its samples by index alone, and then gets another's."""
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    fitted = dd.NoiseModel.isotropic(inputs)
    noise = dd.NoiseModel(fitted.eigenvalues, fitted.multiplicities)
    optimizer = dd.DecoupledDescent(parallel, lr=0.3, noise=noise)
    try:
        for rows in (shard(rank), shard(1 - rank)):
            optimizer.batch(rows)
            train(parallel, optimizer, inputs, labels, [rows])
    except RuntimeError as error:
        return str(error)
    return ""


def alone(rank):
    """Processes that train apart, in one process group."""
    inputs, labels = make_problem()
    model = make_model()
    optimizer = build(model, {}, inputs, labels, process_group=False)
    train(model, optimizer, inputs, labels, [torch.arange(N)] * 2)
    averaged = build(DistributedDataParallel(make_model()), {}, inputs, labels, process_group=False)
    try:
        train(
            averaged._attachment.module, averaged, inputs, labels, [torch.arange(N).roll(rank)[:20]]
        )
    except RuntimeError as error:
        return str(error)
    return ""


def fully_sharded(rank):
    """What FSDP makes of the decoupled weight is refused."""
    noise = dd.NoiseModel.isotropic(*make_problem())
    sentences = []
    for order in ("before", "after"):
        model = make_model()
        try:
            if order == "before":
                fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
            optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise)
            fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
            train(model, optimizer, *make_problem(), [shard(rank)])
        except (RuntimeError, ValueError) as error:
            sentences.append(str(error))
    return sentences


def fitted_together(rank):
    """Without a noise model the optimizer fits one on the samples of all processes."""
    inputs, labels = make_problem()
    parallel = DistributedDataParallel(make_model())
    optimizer = dd.DecoupledDescent(parallel, lr=0.3)
    train(parallel, optimizer, inputs, labels, [shard(rank)] * 2)
    return optimizer.noise.eigenvalues


def kinks(rank):
    """What kinks add, of samples of unequal number, spread and mass on the processes."""
    rows, pushes, masses = kinked()
    own = slice(0, 17) if rank == 0 else slice(17, N)
    ranks = Ranks(dist.group.WORLD)
    estimator = Exact(masses[own])
    both = rows[own], pushes[own]
    return estimator.kinks(Rows(both[1], both[1], None, ranks, *both))


def kinked():
    """R and G of ReLU units, a smooth unit, and one whose gradient is zero only on one process."""
    g = torch.Generator().manual_seed(3)
    rows, pushes = torch.randn(2, N, 4, generator=g).double()
    rows[:17] = 0.3 * rows[:17] + 0.2
    pushes[:, :2] *= rows[:, :2] > 0
    pushes[:17, 3] *= rows[:17, 3] > 0
    return rows, pushes, torch.rand(N, generator=g).double()


TASKS = {
    "kinks": (kinks,),
    **{name: (shared, setting) for name, setting in SETTINGS.items()},
    "wrapped afterwards": (unwrapped_afterwards,),
    "wandering": (wandering, {"momentum": 0.5}),
    "wandering, head": (wandering, {"head": True}),
    "different noise": (different_noise,),
    "alone": (alone,),
    "other order": (other_order,),
    "wandering untold": (wandering_untold,),
    "fitted together": (fitted_together,),
    "fully sharded": (fully_sharded,),
}


def work(rank, port, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=limit)
    found = {name: task(rank, *arguments) for name, (task, *arguments) in TASKS.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found in each task."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=WORLD)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    return {name: [found[name] for found in ranks] for name in TASKS}


@pytest.mark.parametrize("name", [*SETTINGS, "wrapped afterwards"])
def test_two_processes_are_one(results, name):
    weights, shadow = single(SETTINGS.get(name, {}))
    for rank, (own, part, *_) in enumerate(results[name]):
        torch.testing.assert_close(own, weights, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(part, shadow[:, shard(rank)], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["wandering", "wandering, head"])
def test_samples_that_every_process_knows_may_come_to_any(results, name):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = build(model, TASKS[name][1], inputs, labels)
    plan = [torch.cat([rows[rank::WORLD] for rank in range(WORLD)]) for rows in dealt()]
    train(model, optimizer, inputs, labels, plan)
    for own, shadow in results[name]:
        torch.testing.assert_close(
            own, [p.detach() for p in model.parameters()], rtol=1e-8, atol=1e-10
        )
        torch.testing.assert_close(shadow, optimizer.shadow, rtol=1e-7, atol=1e-9)


def test_tracked_loss_is_that_of_all_processes(results):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = build(model, {}, inputs, labels)
    train(model, optimizer, inputs, labels, [torch.arange(N)] * 12)
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs), labels)
    for *_, mean in results["full batch"]:
        torch.testing.assert_close(mean, expected)


def test_kinks_are_those_of_all_samples(results):
    rows, pushes, masses = kinked()
    expected = kinks_of(rows, pushes, masses)
    assert expected.ne(0).tolist() == [True, True, False, False]
    for found in results["kinks"]:
        torch.testing.assert_close(found, expected)


def test_noise_is_fitted_on_the_samples_of_all_processes(results):
    inputs, _ = make_problem()
    expected = dd.NoiseModel.fit(torch.cat([inputs[shard(rank)] for rank in range(WORLD)]))
    for eigenvalues in results["fitted together"]:
        torch.testing.assert_close(eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ("different noise", "different noise models"),
        ("alone", "processes average it"),
        ("other order", "samples of one process came to another"),
        ("wandering untold", "samples of one process came to another"),
    ],
)
def test_what_cannot_work_is_said_on_every_process(results, task, match):
    assert all(match in sentence for sentence in results[task])


def test_fully_sharded_weights_are_refused(results):
    for before, after in results["fully sharded"]:
        assert "leave this layer out of the sharding" in before
        assert "has another weight than when" in after
