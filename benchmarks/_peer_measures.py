"""How far an estimate is from the truth, and what it costs, for ``benchmarks/peers.py``."""

import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from _peer_problems import Problem
from torch import Tensor, nn

Method = Callable[[Problem, Callable[[nn.Module], None]], Tensor]


def accuracy(method: Method, problems: Iterable[Problem]) -> dict[str, Any]:
    """Compare a method's estimates with the truth, over problems that differ in their seed.

    Returns:
        Means over the problems: ``truth`` and ``estimate`` at the last record; ``selected``, the
        truth where the estimate is lowest; ``distance``, that of |estimate − truth| over the
        records (relative to the truth, where errors are squares), with its standard error;
        ``signed``, that of estimate − truth; ``floor``, what sampling alone would make of the
        distance. And how many problems a warning was issued at.
    """
    runs: list[dict[str, float]] = []
    warned: dict[str, int] = {}
    for problem in problems:
        found, names = _run(method, problem)
        runs.append(found)
        for name in names:
            warned[name] = warned.get(name, 0) + 1
    means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
    spread = statistics.stdev(run["distance"] for run in runs) if len(runs) > 1 else math.nan
    return means | {
        "distance_error": spread / math.sqrt(len(runs)),
        "seeds": len(runs),
        "warnings": warned,
    }


def _run(method: Method, problem: Problem) -> tuple[dict[str, float], set[str]]:
    """The figures of one problem, and the kinds of warnings issued."""
    truths: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimates = method(problem, lambda model: truths.append(problem.truth(model)))
    names = {warning.category.__name__ for warning in caught}
    return _compare(problem, estimates.tolist(), truths), names


def _compare(problem: Problem, estimates: list[float], truths: list[float]) -> dict[str, float]:
    off = [
        (estimate - truth) / (truth if problem.square else 1)
        for estimate, truth in zip(estimates, truths, strict=True)
    ]
    return {
        "truth": truths[-1],
        "estimate": estimates[-1],
        "selected": truths[estimates.index(min(estimates))],
        "distance": statistics.fmean(abs(value) for value in off),
        "signed": statistics.fmean(off),
        "floor": statistics.fmean(problem.floor(truth) for truth in truths),
    }


def cost(
    methods: Mapping[str, Method], problem: Problem, small: Problem, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure seconds and memory of fit and estimate, as ratios to those of the first method.

    The methods take turns, so that whatever else the machine does falls on all of them.

    Args:
        methods: to be compared.
        problem: at which they are.
        small: on which each is tried once before, so that nothing is imported or set up later.
        rounds: turns of each.

    Returns:
        For each method ``seconds`` of every round; ``time_ratio``, the median over rounds of the
        ratio; ``extra_bytes``, the most that was allocated at once beside the data; and
        ``memory_ratio``, that of data and extra together, both None where memray is missing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in methods.values():
            method(small, _nothing)
        for _ in range(rounds):
            for name, method in methods.items():
                gc.collect()
                started = time.perf_counter()
                method(problem, _nothing)
                seconds[name].append(time.perf_counter() - started)
        extra = {name: _peak(method, problem) for name, method in methods.items()}
    data = sum(part.nbytes for part in (problem.inputs, problem.targets))
    first = next(iter(methods))
    found = {}
    for name in methods:
        pairs = zip(seconds[name], seconds[first], strict=True)
        found[name] = {
            "seconds": seconds[name],
            "time_ratio": statistics.median(own / reference for own, reference in pairs),
            "data_bytes": data,
            "extra_bytes": extra[name],
            "memory_ratio": _ratio(extra[name], extra[first], data),
            "threads": torch.get_num_threads(),
        }
    return found


def _nothing(model: nn.Module) -> None:
    pass


def _peak(method: Method, problem: Problem) -> int | None:
    """The most that a method has allocated at once, by whatever library, in bytes."""
    try:
        import memray
    except ImportError:
        return None
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocations"
        with memray.Tracker(path):
            method(problem, _nothing)
        return memray.FileReader(path).metadata.peak_memory


def _ratio(own: int | None, first: int | None, data: int) -> float | None:
    if own is None or first is None:
        return None
    return (data + own) / (data + first)
