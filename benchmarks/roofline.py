"""How close a step of decoupled descent (DD) comes to what the machine can do.

    python benchmarks/roofline.py                     # the table of docs/performance.md
    python benchmarks/roofline.py --check             # exit code 1 below 0.8 at d >= 1024

Full-batch steps of the README's loop on a two-layer network. The two products that any gradient
step makes, X W and Gᵀ X, as they run within DD's step, against the same products by themselves,
alternating in one process: *products* is the ratio of their rates. *step* is all floating-point
operations of matrix products in DD's step over its whole time, *memory* two readings of X over that
time, each as a share of what a plain product of the same size and a copy of X reach.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _counts import operations
from _loop import Case, Data, make_data, make_loop
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from step_cost import device_name, synchronise
from torch.profiler import ProfilerActivity, profile

from dd.support.files import write_json

CASES = [
    Case(n, d, k, noise)
    for n, d, k in ((20_000, 256, 64), (20_000, 1024, 64), (20_000, 1024, 512), (20_000, 4096, 64))
    for noise in ("isotropic", "fitted")
]
LARGE = Case(1_000_000, 1024, 64)
SHARE, FROM = 0.8, 1024

Row = dict[str, Any]


def measure(case: Case, options: argparse.Namespace) -> Row:
    """The rates of one case; in operations and bytes a second."""
    data = make_data(case, options.device)
    step = make_loop("dd", case, data)
    for _ in range(3):
        step()
    work = operations(step)
    weight = torch.randn(case.k, case.d, device=options.device)
    gradient = torch.randn(case.n, case.k, device=options.device)
    target = torch.empty_like(data.inputs)
    alone: dict[str, Callable[[], Any]] = {
        "forward": lambda: torch.nn.functional.linear(data.inputs, weight, weight[:, 0]),
        "backward": lambda: gradient.mT @ data.inputs,
        "copy": lambda: target.copy_(data.inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*alone, "products", "step")}
    for _ in range(options.rounds):
        for name, run in alone.items():
            seconds[name].append(timed(run, options.device))
        seconds["step"].append(timed(step, options.device))
        seconds["products"].append(within(step, case, data, options.device))
    plain = [a + b for a, b in zip(seconds["forward"], seconds["backward"], strict=True)]
    two = 4 * case.n * case.d * case.k
    times = zip(plain, seconds["products"], seconds["step"], seconds["copy"], strict=True)
    ratios = [
        (alone / products, (work / step) / (two / alone), copy / step)
        for alone, products, step, copy in times
    ]
    products, whole, memory = (statistics.median(column) for column in zip(*ratios, strict=True))
    return {
        **vars(case),
        "bins": len(data.noise.eigenvalues),
        "plain_flops": two / statistics.median(plain),
        "copy_bytes": 2 * data.inputs.nbytes / statistics.median(seconds["copy"]),
        "step_milliseconds": 1e3 * statistics.median(seconds["step"]),
        "products": products,
        "step": whole,
        "memory": memory,
    }


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def within(step: Callable[[], Any], case: Case, data: Data, device: str) -> float:
    """Seconds that X W and Gᵀ X take within a step.

    Raises:
        RuntimeError: if the step makes no such product.
    """
    on_device = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities, record_shapes=True) as found:
        step()
    shape, total = list(data.inputs.shape), 0.0
    for event in found.key_averages(group_by_input_shape=True):
        if event.key in ("aten::addmm", "aten::mm") and shape in event.input_shapes:
            total += event.device_time_total if on_device else event.cpu_time_total
    if total == 0.0:
        raise RuntimeError(f"no product with inputs of shape {shape} in the step of {case}")
    return total / 1e6


def shown(rows: list[Row]) -> Table:
    """The table."""
    table = Table(box=MARKDOWN)
    for name in ("n", "d", "k", "B", "product, GFLOP/s", "copy, GB/s", "step, ms"):
        table.add_column(name, justify="right")
    for name in ("products", "step", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("n", "d", "k", "bins")),
            f"{row['plain_flops'] / 1e9:.0f}",
            f"{row['copy_bytes'] / 1e9:.1f}",
            f"{row['step_milliseconds']:.3g}",
            *(f"{row[name]:.2f}" for name in ("products", "step", "memory")),
        )
    return table


def main() -> int:
    """Print the table, write it, and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="a million samples as well")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--check", action="store_true", help="exit with 1 below the threshold")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    run = partial(measure, options=options)
    with console.status("measuring"):
        rows = [run(case) for case in [*CASES, *([LARGE] if options.large else [])]]
    console.print(shown(rows))
    if options.json is not None:
        about = {"device": device_name(options.device), "threads": options.threads}
        write_json(options.json, {**about, "torch": torch.__version__, "rows": rows})
    low = [row for row in rows if row["d"] >= FROM and row["products"] < SHARE]
    for row in low:
        console.print(f"n={row['n']} d={row['d']} k={row['k']}: {row['products']:.2f} < {SHARE}")
    return int(options.check and bool(low))


if __name__ == "__main__":
    raise SystemExit(main())
