"""The cost of a step of decoupled descent (DD) over one of the plain optimizer, in time and memory.

    python benchmarks/step_cost.py                            # the table of docs/performance.md
    python benchmarks/step_cost.py --only "k=64" --check      # exit code 1 past a threshold
    python benchmarks/step_cost.py --check-counts             # no clock: operations, bytes, waits

The README's loop on a two-layer network (Linear, GELU, Linear, 10 classes, cross-entropy), the same
data and start for both. They take turns in one process; printed are the median and the quartiles
over the turns of DD's time over the plain one's, the medians of both, and the most memory alive at
once in a step, parameters and optimizer state counted in, the data not. *isotropic* keeps one
shadow a sample, *12 bins* twelve, *fitted* as many as ``NoiseModel.fit`` takes for the spectrum of
the latter. SGD is decoupled descent's own rule; AdamW and Muon (beside AdamW for the rest) are
followed by ``dd.decouple``. At n = 20 000, d = 1024, full batch, Stein's curvature, on CPU and GPU,
DD may take

* 1.15 of SGD's time for k = 64, isotropic, and 1.30 with a fitted spectrum;
* 2.0 of it for k = 512, isotropic;
* 1.35 of AdamW's and 1.2 of Muon's for k = 64, isotropic, and 1.8 of either in batches of 256;
* 1.2 B n k numbers more than SGD at its peak, B shadows a sample.

``--check-counts`` needs a second or two: the operations of DD's matrix products are those of its
formulas, its peak memory is as above, and no step waits for a device.
"""

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _counts import as_on_a_device, host_reads, operations, peak_bytes
from _loop import NOISES, Case, Data, make_data, make_loop
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from dd.support.files import write_json
from dd.support.fingerprint import PROJECTIONS

BASE = {"n": 20_000, "d": 1024, "k": 64}
CASES = [
    *(Case(**BASE, noise=noise, curvature=c) for c in ("stein", "probe") for noise in NOISES),
    *(Case(**BASE | {"k": k}, noise=noise) for k in (8, 256, 512) for noise in NOISES[::2]),
    *(Case(**BASE | {"d": d}, noise=noise) for d in (64, 256, 4096) for noise in NOISES[::2]),
    *(Case(**BASE | {"n": n}, noise=noise) for n in (1000, 5000, 100_000) for noise in NOISES[::2]),
    *(Case(1_000_000, d, 64, noise) for d in (64, 1024) for noise in NOISES[::2]),
    *(Case(**BASE, noise=noise, batch=m) for m in (250, 2000) for noise in NOISES[::2]),
    *(Case(**BASE, batch=m, rule=rule) for rule in ("AdamW", "Muon") for m in (None, 256)),
]
SMALL = [Case(20_000, 64, 64, noise, c) for c in ("stein", "probe") for noise in NOISES]
TIME_LIMITS = {
    Case(**BASE): 1.15,
    Case(**BASE, noise="fitted"): 1.30,
    Case(**BASE | {"k": 512}): 2.0,
    Case(**BASE, rule="AdamW"): 1.35,
    Case(**BASE, rule="Muon"): 1.2,
    Case(**BASE, rule="AdamW", batch=256): 1.8,
    Case(**BASE, rule="Muon", batch=256): 1.8,
}
MEMORY_LIMIT = 1.2
# Seconds of a turn at least, and turns at least.
TURN, TURNS = 0.05, 5

Row = dict[str, Any]


def measure(case: Case, options: argparse.Namespace) -> Row:
    """Time and memory of both optimizers."""
    data = make_data(case, options.device)
    bins = len(data.noise.eigenvalues)
    seconds = time_turns(case, data, options)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["dd"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    peaks = peaks_of(case, data, options.device)
    return {
        **vars(case),
        "bins": bins,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "plain_milliseconds": 1e3 * statistics.median(seconds["plain"]),
        "dd_milliseconds": 1e3 * statistics.median(seconds["dd"]),
        "turns": len(ratios),
        "plain_peak_bytes": peaks["plain"],
        "dd_peak_bytes": peaks["dd"],
        "extra_over_shadows": (peaks["dd"] - peaks["plain"]) / (4 * case.n * case.k * bins),
    }


def peaks_of(case: Case, data: Data, device: str) -> dict[str, int]:
    """Peak bytes of both optimizers."""
    kinds = ("plain", "dd")
    return {kind: peak_bytes(partial(make_loop, kind, case, data), device) for kind in kinds}


def time_turns(case: Case, data: Data, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each optimizer, in turns."""
    loops = {kind: make_loop(kind, case, data) for kind in ("plain", "dd")}
    count = 1
    for _ in range(3):
        longest = max(timed(loop, count, options.device) for loop in loops.values())
    count = max(1, round(TURN / longest))
    seconds: dict[str, list[float]] = {kind: [] for kind in loops}
    until = time.perf_counter() + options.seconds
    while time.perf_counter() < until or len(seconds["dd"]) < TURNS:
        for kind, loop in loops.items():
            seconds[kind].append(timed(loop, count, options.device))
    return seconds


def timed(loop: Any, count: int, device: str) -> float:
    """Seconds a step."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(count):
        loop()
    synchronise(device)
    return (time.perf_counter() - started) / count


def synchronise(device: str) -> None:
    """Wait for all work on a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def misses(row: Row) -> Iterator[str]:
    """What is past a threshold."""
    case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
    limit = TIME_LIMITS.get(case)
    if limit is not None and row["ratio"] > limit:
        yield f"{case}: {row['ratio']:.3f} of the plain time, above {limit}"
    is_base = {"n": case.n, "d": case.d, "k": case.k} == BASE
    stein = case.curvature == "stein" and case.batch is None and case.rule == "SGD"
    if is_base and stein and row["extra_over_shadows"] > MEMORY_LIMIT:
        yield f"{case}: {row['extra_over_shadows']:.3f} B n k more than plain, above {MEMORY_LIMIT}"


def shown(rows: list[Row]) -> Table:
    """The table of times and memory."""
    table = Table(box=MARKDOWN)
    for name in ("n", "d", "k", "batch", "rule", "noise", "B", "H"):
        table.add_column(name, justify="left" if name in ("rule", "noise", "H") else "right")
    for name in ("plain, ms", "DD, ms", "ratio", "quartiles", "peak, MB", "extra / (B n k)"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            *(str(row[name]) for name in ("n", "d", "k")),
            "all" if row["batch"] is None else str(row["batch"]),
            row["rule"],
            row["noise"],
            str(row["bins"]),
            row["curvature"],
            f"{row['plain_milliseconds']:.3g}",
            f"{row['dd_milliseconds']:.3g}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['plain_peak_bytes'] / 1e6:.1f} / {row['dd_peak_bytes'] / 1e6:.1f}",
            f"{row['extra_over_shadows']:.2f}",
        )
    return table


def check_counts(console: Console) -> list[str]:
    """Hold what a step does against its formulas; return what does not agree."""
    found, wrong = Table(box=MARKDOWN), []
    for name in ("case", "operations / 2nk²", "formula", "peak / (B n k)", "limit", "waits"):
        found.add_column(name)
    for case in SMALL:
        data = make_data(case, "cpu")
        with as_on_a_device():
            loops = {kind: make_loop(kind, case, data) for kind in ("plain", "dd")}
            # The step after next is the fourth, which is not audited.
            for loop in loops.values():
                for _ in range(2):
                    loop()
            products = operations(loops["dd"]) - operations(loops["plain"])
            waits = host_reads(loops["dd"])
        peaks = peaks_of(case, data, "cpu")
        bins = len(data.noise.eigenvalues)
        unit, limit = 2 * case.n * case.k**2, memory_limit(case, bins)
        extra = (peaks["dd"] - peaks["plain"]) / (4 * case.n * case.k * bins)
        expected = formula(case, bins)
        found.add_row(
            f"{case}, B = {bins}",
            f"{products / unit:.3f}",
            f"{expected / unit:.3f}",
            f"{extra:.3f}",
            f"{limit:.2f}",
            ", ".join(waits) or "none",
        )
        if products > expected or extra > limit or waits:
            wrong.append(str(case))
    console.print(found)
    return wrong


def formula(case: Case, bins: int) -> int:
    """Operations of DD's matrix products beyond those of SGD, in one step on all samples.

    Q_b H for every shadow; R_cᵀR_c and R_cᵀG for Stein's curvature, or VᵀV and VᵀHV for a probe's,
    for which torch differentiates each of the head's three products along both of its factors; into
    the eigenbasis of R_cᵀR_c and back for Stein's; and the weight's gradient, as it was made and as
    it is now, along random directions of the inputs.
    """
    n, d, k, classes = case.n, case.d, case.k, 10
    total = 2 * n * k * k * (bins + 2) + 2 * PROJECTIONS * k * 2 * d
    if case.curvature == "probe":
        return total + 6 * 2 * n * k * classes
    return total + 4 * 2 * k**3


def memory_limit(case: Case, bins: int) -> float:
    """Peak memory beyond that of SGD, in B n k numbers.

    The probe takes its own n k numbers and as many for everything that the recorded backward pass
    keeps: of the activation, its gradient and that of R, and what torch's formulas hold meanwhile.
    """
    return MEMORY_LIMIT + (0 if case.curvature == "stein" else 9 / bins)


def main() -> int:
    """Print the table, write it, and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="of every case, at least")
    parser.add_argument("--only", default="", help="cases whose line matches this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--figure", type=Path, help="picture to write")
    parser.add_argument("--check", action="store_true", help="exit with 1 past a threshold")
    parser.add_argument("--check-counts", action="store_true", help="check what needs no clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    console = Console(width=200)
    if options.check_counts:
        wrong = check_counts(console)
        console.print(*(f"not as derived: {case}" for case in wrong), sep="\n")
        return int(bool(wrong))
    about = {"device": device_name(options.device), "threads": options.threads}
    rows: list[Row] = []
    with console.status("") as status:
        for case in (case for case in CASES if re.search(options.only, str(case))):
            status.update(str(case))
            rows.append(measure(case, options))
            # The largest cases take minutes each.
            if options.json is not None:
                write_json(options.json, {**about, "torch": torch.__version__, "rows": rows})
    console.print(shown(rows))
    if options.figure is not None:
        from _step_cost_figure import draw

        draw(rows, options.figure)
    missed = [text for row in rows for text in misses(row)]
    for text in missed:
        console.print(text)
    return int(options.check and bool(missed))


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if cpu.exists() and names else "cpu"


if __name__ == "__main__":
    raise SystemExit(main())
