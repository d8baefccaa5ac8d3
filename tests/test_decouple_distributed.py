"""Two processes that share the samples are one process, under any optimizer."""

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dd

N, D, K, C, WORLD, STEPS = 200, 60, 3, 4, 2, 6
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.5),
}
SIZES = (None, 25)
HEADS = (False, True)


def problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    means = torch.randn(C, D, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(N, D, generator=generator, dtype=torch.float64), labels


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).double()


def own_rows(rank):
    return torch.arange(rank, N, WORLD)


def part(rank, size, step):
    rows = own_rows(rank)
    return rows if size is None else rows.roll(-size * step)[:size]


def trained(model, base, name, noise, rows_of, **options):
    inputs, labels = problem()
    optimizer = OPTIMIZERS[name](base.parameters())
    tracker = dd.decouple(model, optimizer, noise=noise, **options)
    for step in range(STEPS):
        rows = rows_of(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    states = tracker._state
    found = [base[0].weight.detach(), tracker.shadow.transpose(0, 1)]
    if options["head"]:
        found += [states[base[0].weight]["signal_shadow"], states[base[2].weight]["shadow"]]
    return [tensor.clone() for tensor in found]


def work(rank, port, results):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    noise = dd.NoiseModel.fit(*problem(), bins=2).of(own_rows(rank))
    for name in OPTIMIZERS:
        for size, head in itertools.product(SIZES, HEADS):
            base = network()
            model = DistributedDataParallel(base)
            rows_of = lambda step, size=size: part(rank, size, step)  # noqa: E731
            found = trained(model, base, name, noise, rows_of, head=head)
            results[rank, name, size, head] = [tensor.tolist() for tensor in found]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(work, (port, found), nprocs=WORLD)
        return dict(found)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_are_one(results, name, size, head):
    base, noise = network(), dd.NoiseModel.fit(*problem(), bins=2)

    def rows_of(step):
        rows = torch.cat([part(rank, size, step) for rank in range(WORLD)])
        return rows.sort().values if size is None else rows

    weight, *shadows = trained(base, base, name, noise, rows_of, process_group=False, head=head)
    for rank in range(WORLD):
        found = [torch.tensor(v, dtype=torch.float64) for v in results[rank, name, size, head]]
        # Sums in another order, which regressions of double precision carry on.
        torch.testing.assert_close(found[0], weight, rtol=1e-9, atol=1e-12)
        for own, all_rows in zip(found[1:], shadows, strict=True):
            torch.testing.assert_close(own, all_rows[own_rows(rank)], rtol=1e-9, atol=1e-12)
