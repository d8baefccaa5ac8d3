"""Full-batch steps on a file that is mapped into memory, against the same steps on data in memory.

    python benchmarks/streaming.py                    # 4 GB in a temporary file
    python benchmarks/streaming.py --rows 500000 --device cuda

Writes n samples of dimension d to a file, and makes the README's steps on chunks of it, and on the
same numbers in memory, in turns in one process. Printed are seconds a
step, the rate at which the file was read, and how far the two paths are apart at the end. On CUDA
the chunks pass through pinned memory. A file that fits into free memory stays there after the first
step; that one is printed apart.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dd
from dd.noise.model import NoiseModel

CLASSES, WIDTH = 10, 64

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def write(path: Path, rows: int, dimension: int, mode: str) -> tuple[np.memmap, np.ndarray]:
    """Write classes around means of their own, and map them."""
    generator = np.random.default_rng(0)
    labels = generator.integers(CLASSES, size=rows)
    means = generator.normal(size=(CLASSES, dimension)) * 2 / dimension**0.5
    inputs = np.memmap(path, np.float32, "w+", shape=(rows, dimension))
    for start in track(range(0, rows, 8192), description="writing"):
        some = labels[start : start + 8192]
        inputs[start : start + 8192] = means[some] + generator.normal(size=(len(some), dimension))
    inputs.flush()
    return np.memmap(path, np.float32, mode, shape=(rows, dimension)), labels


def make_step(
    batches: Batches, noise: NoiseModel, device: str
) -> tuple[Callable[[], None], nn.Module]:
    """Return what makes one full-batch step, and its model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(noise.dimension, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES))
    model.to(device)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)

    def step() -> None:
        optimizer.zero_grad()
        for inputs, labels in batches():
            outputs = model(inputs.to(device, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            loss = F.cross_entropy(outputs, labels, reduction="sum") / noise.fitted_on
            loss.backward()
        optimizer.step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    return step, model


def timed(run: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="samples, n")
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=8192, help="samples of a chunk")
    parser.add_argument("--workers", type=int, default=0, help="processes that read ahead")
    parser.add_argument("--mode", default="c", help="of the mapped file, r or c")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        inputs, labels = write(
            Path(folder) / "inputs", options.rows, options.dimension, options.mode
        )
        seconds = time.perf_counter()
        noise = NoiseModel.fit(inputs, labels, bins=1, per_sample=False)
        console.print(f"noise model: {time.perf_counter() - seconds:.1f} s")
        loader = DataLoader(
            dd.Chunks(inputs, labels, rows=options.chunk),
            batch_size=None,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            pin_memory=torch.device(options.device).type == "cuda",
        )
        whole = torch.from_numpy(np.array(inputs)), torch.from_numpy(labels)
        streamed, first = make_step(lambda: iter(loader), noise, options.device)
        resident, second = make_step(lambda: iter([whole]), noise, options.device)
        console.print(
            f"first step: streamed {timed(streamed):.2f} s, in memory {timed(resident):.2f} s"
        )
        pairs = [(timed(streamed), timed(resident)) for _ in range(options.steps)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    weights = [[p.detach() for p in model.parameters()] for model in (first, second)]
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*weights, strict=True))
    console.print(
        f"step: streamed {ours:.2f} s ({inputs.nbytes / ours / 1e9:.2f} GB/s), in memory "
        f"{theirs:.2f} s, ratio {statistics.median(a / b for a, b in pairs):.2f}; weights apart by "
        f"{apart:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
