"""Training on files larger than memory: the same path as in memory, and within it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dd

# Trains on a mapped file, its data segment limited to what it has and LIMIT bytes more, or not.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from torch import nn
import dd

path, n, d, limit = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)

def train(inputs, labels, steps, rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, 4), nn.GELU(), nn.Linear(4, 2))
    noise = dd.NoiseModel.fit(inputs, labels, bins=1, per_sample=False)
    # A probe keeps as much again.
    optimizer = dd.DecoupledDescent(model, lr=0.5, momentum=0.9, noise=noise, curvature="stein")
    chunks, losses = dd.Chunks(inputs, labels, rows=rows), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for x, y in chunks:
            loss = F.cross_entropy(model(x), y, reduction="sum") / chunks.num_samples
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    return losses, model

small = np.random.default_rng(0).normal(size=(512, d)).astype(np.float32)
train(small, np.arange(512) % 2, 2, 256)
if limit:
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
inputs = np.memmap(path, np.float32, "r", shape=(n, d))
labels = np.arange(n) % 2
losses, model = train(inputs, labels, 3, 2048 if limit else n)
if limit:
    try:
        torch.empty(n, d).zero_()
        sys.exit("the limit does not hold")
    except RuntimeError:
        pass
print(json.dumps([losses, [p.flatten().tolist() for p in model.parameters()]]))
"""


def run(path, n, d, limit):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(path), *map(str, (n, d, limit))]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_data_of_several_times_the_memory_give_the_path_of_data_in_memory(tmp_path):
    n, d = 2**17, 256
    path, generator = tmp_path / "inputs", np.random.default_rng(1)
    with path.open("wb") as file:
        for start in range(0, n, 4096):
            rows = generator.normal(size=(4096, d)).astype(np.float32)
            rows[:, 0] += 2.0 * (np.arange(start, start + 4096) % 2)
            file.write(rows.tobytes())
    limit = 40 * 2**20
    assert path.stat().st_size > 3 * limit
    losses, weights = run(path, n, d, limit)
    whole_losses, whole_weights = run(path, n, d, 0)
    assert losses[-1] < losses[0]
    # Sums of 2^17 terms in float32 in another order: a relative error of √n roundings at most.
    tolerance = n**0.5 * torch.finfo(torch.float32).eps
    np.testing.assert_allclose(losses, whole_losses, rtol=tolerance)
    for some, whole in zip(weights, whole_weights, strict=True):
        np.testing.assert_allclose(some, whole, rtol=0, atol=tolerance * np.abs(whole).max())


def test_a_worker_reads_the_chunks_ahead():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, 12, generator=generator)
    labels = torch.arange(90) % 3
    chunks = dd.Chunks(inputs.numpy(), labels, rows=40)
    ends = []
    for source in (
        [(inputs, labels)],
        chunks,
        DataLoader(chunks, batch_size=None, num_workers=1, pin_memory=torch.cuda.is_available()),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))
        noise = dd.NoiseModel.fit(inputs, labels)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in source:
                (F.cross_entropy(model(x), y, reduction="sum") / chunks.num_samples).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ends[2], ends[1], rtol=0, atol=0)


def test_chunks_hold_every_row_once():
    chunks = dd.Chunks(np.arange(10), torch.arange(20).reshape(10, 2), rows=4)
    assert len(chunks) == 3
    assert [len(x) for x, _ in chunks] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in chunks]), torch.arange(10))
    assert torch.equal(torch.cat([y for _, y in chunks]), torch.arange(20).reshape(10, 2))
    with pytest.raises(IndexError, match="chunk 3 of 3"):
        chunks[3]


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_file_is_mapped_anew_in_a_worker_and_never_written_to(tmp_path, mode):
    path, values = tmp_path / "inputs", np.arange(40_000, dtype=np.float32).reshape(1000, 40)
    path.write_bytes(values.tobytes())
    chunks = dd.Chunks(np.memmap(path, np.float32, mode, shape=values.shape), rows=400)
    state = pickle.dumps(chunks)
    assert len(state) < 2000
    again = pickle.loads(state)  # noqa: S301
    for some in (chunks, again):
        for number, (x,) in enumerate(some):
            assert torch.equal(x, torch.from_numpy(values)[400 * number : 400 * (number + 1)])
            x -= 1
    assert path.read_bytes() == values.tobytes()


@pytest.mark.parametrize(
    ("arrays", "rows", "message"),
    [
        ((), 4, "one row a sample each, got lengths"),
        ((np.ones(3), np.ones(4)), 4, r"got lengths \[3, 4\]"),
        ((np.ones(0),), 4, "got lengths"),
        ((np.ones(3),), 0, "Chunks: rows must be"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, rows, message):
    with pytest.raises(ValueError, match=message):
        dd.Chunks(*arrays, rows=rows)
