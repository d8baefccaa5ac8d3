"""Which estimate of the error on new data to trust, and what it costs: decoupled descent's peers.

On one data set and model each, over several sizes at fixed n/d:

* *linear*, *linear_anisotropic*: square loss along the path of gradient descent, n = 2d, without a
  penalty; *linear_few*, *linear_few_decay*: n = d/2, without and with weight decay;
* *ridge*, *logistic*: at the minimum of a convex loss, n = 2d;
* *network*: two layers on XOR, n = 2d, along the path.

Contestants: the training error of plain gradient descent (GD), 5-fold cross-validation, the
corrected path of Bellec and Tan, exact leave-one-out, RandALO, and the error that decoupled descent
(DD) tracks; on the network also AdamW, plain and beside ``dd.decouple``, which is told the
clusters. Each estimates the error of the model that it fits; *distance* is |estimate − truth|, mean
over the path and the seeds, for square loss relative to the truth, and *in floors* what it is of
the distance that n new samples would leave; *selected* is the error where the estimate is lowest
along the path. Seconds and memory are those of fit and estimate
together, as ratios to GD's own fit of the same steps, in one process on one thread; memory counts
the data.

    python benchmarks/peers.py --check --json peers.json --figure peers.png
    python benchmarks/peers.py network --sizes 4000 --only cost
    python benchmarks/peers.py --read first.json second.json --figure peers.png
    python benchmarks/peers.py linear ridge --read first.json
    python benchmarks/peers.py --quick

RandALO and the memory need ``uv sync --group peers`` and are left out, with a sentence, without.
With ``--check`` the exit code is 1 where a sentence of :func:`missed` applies.
"""

import argparse
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _peer_methods as descents
import _peer_optimum as optimum
import torch
from _peer_measures import Method, accuracy, cost
from _peer_picture import draw
from _peer_problems import PROBLEMS
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from dd.support.files import write_json

SIZES, QUICK_SIZES, SMALL, QUICK_STEPS = (250, 500, 1000, 2000), (30,), 20, 10
# n refits: beyond this nobody would.
MOST_REFITS = 500

LABELS = {
    "gd": "GD: training error",
    "gd_kfold": "GD: 5-fold cross-validation",
    "gd_path": "GD: corrected path",
    "gd_probed": "GD: corrected path, probed",
    "solver": "solver: training error",
    "solver_kfold": "solver: 5-fold cross-validation",
    "solver_loo": "solver: exact leave-one-out",
    "solver_randalo": "solver: RandALO",
    "dd": "DD: tracked",
    "dd_isotropic": "DD, isotropic noise: tracked",
    "adamw": "AdamW: training error",
    "dd_adamw": "AdamW, decoupled: tracked",
}
ALONG_LINEAR: Mapping[str, Method] = {
    "gd": descents.gradient_descent,
    "gd_kfold": descents.cross_validation,
    "gd_path": descents.corrected_path,
    "dd": descents.decoupled,
}
AT_OPTIMUM: Mapping[str, Method] = {
    "gd": descents.gradient_descent,
    "solver": optimum.solved,
    "solver_kfold": optimum.cross_validation,
    "solver_randalo": optimum.randomised,
}
STUDIES: Mapping[str, Mapping[str, Method]] = {
    "linear": ALONG_LINEAR
    | {"gd_probed": descents.probed_path, "dd_isotropic": descents.decoupled_isotropic},
    "linear_anisotropic": ALONG_LINEAR | {"dd_isotropic": descents.decoupled_isotropic},
    "linear_few": ALONG_LINEAR,
    "linear_few_decay": ALONG_LINEAR,
    "ridge": AT_OPTIMUM
    | {"solver_loo": optimum.leave_one_out_ridge, "dd": descents.decoupled_ridge},
    "logistic": AT_OPTIMUM | {"solver_loo": optimum.leave_one_out, "dd": descents.decoupled},
    "network": {
        "gd": descents.gradient_descent,
        "gd_kfold": descents.cross_validation,
        "dd": descents.decoupled,
        "dd_isotropic": descents.decoupled_isotropic,
        "adamw": descents.adamw,
        "dd_adamw": descents.decoupled_adamw,
    },
}

# At one output a step of decoupled descent is nearly all fixed cost.
NETWORK = "network"

# Of the error of their models without a bias that stays as n and d grow.
ESTIMATES = ("gd_path", "solver_loo", "solver_randalo", "dd")

Row = dict[str, Any]


def measure(study: str, d: int, given: argparse.Namespace) -> list[Row]:
    """Return a row for each method of a study at one size."""
    build = partial(PROBLEMS[study], **({"steps": QUICK_STEPS} if given.quick else {}))
    problem = build(d, 0)
    methods = {
        name: method
        for name, method in STUDIES[study].items()
        if (name != "solver_randalo" or importlib.util.find_spec("randalo"))
        and (method is not optimum.leave_one_out or len(problem.inputs) <= MOST_REFITS)
    }
    about = {"study": study, "d": d, "n": len(problem.inputs)}
    rows = {name: {**about, "method": name, "accuracy": None, "cost": None} for name in methods}
    if given.only != "cost":
        for name, method in methods.items():
            _tell(f"{study}, d = {d}: {LABELS[name]}")
            problems = (build(d, seed) for seed in range(given.seeds))
            rows[name]["accuracy"] = accuracy(method, problems)
    if given.only != "accuracy":
        _tell(f"{study}, d = {d}: seconds and memory")
        for name, found in cost(methods, problem, build(SMALL, 0), given.rounds).items():
            rows[name]["cost"] = found
    _tell("")
    return list(rows.values())


def joined(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return results as one: of two figures for one method and size the later."""
    rows: dict[tuple[str, int, str], Row] = {}
    about: list[Any] = []
    for result in results:
        about += result["runs"]
        for row in result["rows"]:
            key = (row["study"], row["d"], row["method"])
            known = rows.setdefault(key, dict(row))
            known |= {part: row[part] for part in ("accuracy", "cost") if row[part] is not None}
    order = {name: place for place, name in enumerate(STUDIES)}
    places = {study: list(methods) for study, methods in STUDIES.items()}
    keys = sorted(rows, key=lambda key: (order[key[0]], key[1], places[key[0]].index(key[2])))
    return {"runs": about, "rows": [rows[key] for key in keys]}


def table(study: str, rows: Iterable[Row]) -> Table:
    """Return the figures of one study."""
    square = study.startswith(("linear", "ridge"))
    shown = Table(title=study, box=MARKDOWN, title_justify="left")
    for column in ("d", "n"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("method", no_wrap=True)
    kind = "squared error" if square else "error"
    for column in (f"{kind}, end", "it says", "selected", "distance", "in floors", "signed"):
        shown.add_column(column, justify="right", no_wrap=True)
    for column in ("time", "memory", "extra / X"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            *(str(row["d"]), str(row["n"]), LABELS[row["method"]]),
            *_accuracy_cells(row["accuracy"]),
            *_cost_cells(row["cost"]),
        )
    return shown


def _accuracy_cells(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [""] * 6
    return [
        _number(found["truth"]),
        _number(found["estimate"]),
        _number(found["selected"]),
        f"{_number(found['distance'])} ± {_number(found['distance_error'])}",
        f"{found['distance'] / found['floor']:.1f}",
        f"{found['signed']:+.3f}",
    ]


def _cost_cells(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [""] * 3
    if found["memory_ratio"] is None:
        return [f"{found['time_ratio']:.2f}", "", ""]
    extra = found["extra_bytes"] / found["data_bytes"]
    return [f"{found['time_ratio']:.2f}", f"{found['memory_ratio']:.2f}", f"{extra:.2f}"]


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def missed(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on each claim that the figures do not bear out.

    * What is said to be an estimate is one: nearer than three standard errors of what sampling
      leaves in the mean over the seeds. A distance |N(0, s²)| has deviation 0.76 of its mean; and d
      weights fitted to n residuals leave n − d of them, whose average strays √(n/(n − d)) as far.
      (Not so at n < d, where decoupled descent may diverge.)
    * The training error of gradient descent, or of AdamW, is none: more than five floors away.
    * Along the path of a network decoupled descent costs less than 5-fold cross-validation at the
      largest size.
    """
    sentences = []
    for row in rows:
        found, where = row["accuracy"], f"{row['study']}, d = {row['d']}: {LABELS[row['method']]}"
        if found is None:
            continue
        floors = found["distance"] / found["floor"]
        if row["method"] in ESTIMATES and row["n"] > row["d"]:
            stray = math.sqrt(row["n"] / (row["n"] - row["d"]))
            limit = stray * (1 + 3 * 0.76 / math.sqrt(found["seeds"]))
            if not floors < limit:
                sentences.append(f"{where} is {floors:.1f} floors off, beyond {limit:.1f}")
        if row["method"] in ("gd", "adamw") and not floors > 5:
            sentences.append(f"{where} is {floors:.1f} floors off only")
    return sentences + [
        f"{NETWORK}, d = {d}: decoupled descent takes {ours:.1f} times the time of gradient "
        f"descent, cross-validation {folds:.1f}"
        for d, ours, folds in _times_at_largest(rows, NETWORK)
        if not ours < folds
    ]


def _times_at_largest(rows: Iterable[Row], study: str) -> list[tuple[int, float, float]]:
    """The largest size, and there the time ratios of decoupled descent and cross-validation."""
    ratios: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["study"] == study and row["cost"] is not None:
            ratios.setdefault(row["d"], {})[row["method"]] = row["cost"]["time_ratio"]
    both = {d: found for d, found in ratios.items() if {"dd", "gd_kfold"} <= set(found)}
    return [(d, both[d]["dd"], both[d]["gd_kfold"]) for d in sorted(both)[-1:]]


def _tell(text: str) -> None:
    print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _earlier(name: str) -> Mapping[str, Any]:
    """Read what an earlier run wrote with --json.

    Raises:
        ArgumentTypeError: if that is not what the file holds.
    """
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {name!r}: {error}") from None
    if not isinstance(found, dict) or not {"runs", "rows"} <= set(found):
        raise argparse.ArgumentTypeError(f"{name!r} was not written by this program's --json")
    return found


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--sizes", type=_positive, nargs="+", help=f"d, by default {SIZES}")
    parser.add_argument("--seeds", type=_positive, default=5, help="data sets of each size")
    parser.add_argument("--rounds", type=_positive, default=3, help="timings of each method")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--only", choices=("accuracy", "cost"), help="measure this alone")
    parser.add_argument("--quick", action="store_true", help="a few steps on tiny data, as a trial")
    parser.add_argument(
        "--read", type=_earlier, nargs="+", metavar="JSON", help="join these, and measure nothing"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--figure", type=Path, help="where to draw them, .png")
    parser.add_argument("--check", action="store_true", help="fail where a claim does not hold")
    return parser


def results(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, or read what was measured."""
    if given.read:
        found = joined(given.read)
        named = given.studies or STUDIES
        return found | {"rows": [row for row in found["rows"] if row["study"] in named]}
    sizes = given.sizes or (QUICK_SIZES if given.quick else SIZES)
    rows: list[Row] = []
    with threadpool_limits(given.threads):
        torch.set_num_threads(given.threads)
        for study in given.studies or STUDIES:
            for d in sizes:
                rows += measure(study, d, given)
    run = {name: getattr(given, name) for name in ("seeds", "rounds", "threads", "only", "quick")}
    about = {"torch": torch.__version__, "machine": platform.machine(), "sizes": list(sizes)}
    return joined([{"runs": [run | about], "rows": rows}])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each study, and write and check what was asked for."""
    parser = options()
    given = parser.parse_args(arguments)
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(f"studies are {', '.join(STUDIES)}; got {', '.join(sorted(unknown))}")
    found = results(given)
    if given.json is not None:
        write_json(given.json, found)
    for study in STUDIES:
        if rows := [row for row in found["rows"] if row["study"] == study]:
            Console(width=200).print(table(study, rows))
    if importlib.util.find_spec("randalo") is None:
        print("RandALO is not installed and was left out: uv sync --group peers")
    if importlib.util.find_spec("memray") is None:
        print("memray is not installed, and memory was not measured: uv sync --group peers")
    if given.figure is not None:
        draw(found["rows"], LABELS, given.figure)
    sentences = missed(found["rows"]) if given.check else []
    for sentence in sentences:
        print(f"missed: {sentence}")
    return int(bool(sentences))


if __name__ == "__main__":
    sys.exit(main())
