"""From the splits of ``benchmarks/tables.py`` to a line a table, and to what all tables say."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from _tables_methods import ESTIMATES, LABELS

NEAR, FAR = 0.01, 0.03
MOST_WARNED = 0.25
COVERAGE = (0.85, 0.95)
WORSE_THAN_BEST = 0.01

Row = Mapping[str, Any]


def lines(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return what the splits of each table and method have in common, sorted by table."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["table"], row["method"]), []).append(row)
    order = list(LABELS)
    keys = sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    return [_line(groups[key]) for key in keys]


def summary(rows: Sequence[Row], method: str) -> dict[str, Any]:
    """Return what a method's word is worth, over all tables.

    * Of the tables where it does not warn: the largest |mean gap| less two standard errors, how
      many lie beyond ``NEAR`` and two standard errors, and how many beyond ``FAR``.
    * Of all tables: the share where it warns, and the mean of its test error less that of
      gradient descent at its best moment, None where that was not measured.
    * Of the splits where it does not warn: the share whose test error is in the interval, None
      where there are none.
    """
    mine = [row for row in rows if row["method"] == method]
    tables = lines(mine)
    trusted = [line for line in tables if not line["warns"]]
    silent = [row for row in mine if not row["warned"]]
    worse = differences_from_best(rows, method)
    return {
        "method": method,
        "tables": len(tables),
        "warned": len(tables) - len(trusted),
        "warned_share": (len(tables) - len(trusted)) / len(tables),
        "largest": max((abs(line["gap"]) - 2 * line["error"] for line in trusted), default=None),
        "near": [line["table"] for line in trusted if beyond_near(line)],
        "far": [line["table"] for line in trusted if abs(line["gap"]) > FAR],
        "splits": len(silent),
        "coverage": fmean(map(_covered, silent)) if silent else None,
        "worse": fmean(worse.values()) if worse else None,
    }


def differences_from_best(rows: Iterable[Row], method: str) -> dict[str, float]:
    """Return for each table the mean of test error less gradient descent's lowest."""
    best: dict[tuple[str, int], float] = {}
    tests: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row["table"], row["seed"])
        if row["method"] == "gd":
            best[key] = row["best"]
        if row["method"] == method:
            tests[key] = row["test"]
    found: dict[str, list[float]] = {}
    for key in tests.keys() & best.keys():
        found.setdefault(key[0], []).append(tests[key] - best[key])
    return {table: fmean(values) for table, values in found.items()}


def beyond_near(line: Row) -> bool:
    """Whether a table's mean gap is beyond ``NEAR`` by more than two standard errors."""
    return abs(line["gap"]) > NEAR + 2 * line["error"]


def missed(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on each claim of decoupled descent that the figures do not bear out."""
    sentences = []
    for method in ESTIMATES:
        if not any(row["method"] == method for row in rows):
            continue
        found, label = summary(rows, method), LABELS[method]
        for line in lines(row for row in rows if row["method"] == method):
            if line["table"] in {*found["near"], *found["far"]}:
                sentences.append(
                    f"{label}: on {line['table']} the gap is {line['gap']:+.4f} "
                    f"± {line['error']:.4f} and nothing is warned"
                )
        if found["warned_share"] > MOST_WARNED:
            sentences.append(
                f"{label}: warns on {found['warned']} of {found['tables']} tables, "
                f"more than {MOST_WARNED:.0%}"
            )
        low, high = COVERAGE
        if found["coverage"] is None or not low <= found["coverage"] <= high:
            sentences.append(
                f"{label}: intervals cover {_percent(found['coverage'])} of the test errors, "
                f"not {low:.0%} to {high:.0%}"
            )
        if found["worse"] is not None and found["worse"] > WORSE_THAN_BEST:
            sentences.append(
                f"{label}: the test error is {found['worse']:.4f} above the best of gradient "
                f"descent, more than {WORSE_THAN_BEST}"
            )
    return sentences


def told(found: Row) -> str:
    """Return a summary as text."""
    trusted = found["tables"] - found["warned"]
    parts = [f"{LABELS[found['method']]}: warns on {found['warned']} of {found['tables']} tables"]
    if trusted:
        parts.append(
            f"of the other {trusted} the largest |mean gap| − 2 s.e. is {found['largest']:.4f}"
        )
        parts += [
            f"{len(names)} are beyond {limit}{_listed(names)}"
            for limit, names in ((f"{NEAR} + 2 s.e.", found["near"]), (FAR, found["far"]))
        ]
    parts.append(
        f"intervals cover {_percent(found['coverage'])} in the {found['splits']} splits "
        "without a warning"
    )
    if found["worse"] is not None:
        parts.append(f"mean test error − GD's best {found['worse']:+.4f}")
    return ";\n  ".join(parts)


def _line(rows: Sequence[Row]) -> dict[str, Any]:
    gaps = [row["reported"] - row["test"] for row in rows]
    kinds = Counter(kind for row in rows for kind in row["warned"])
    warned = sum(bool(row["warned"]) for row in rows)
    bests = [row["best"] for row in rows if row["best"] is not None]
    return {name: rows[0][name] for name in ("table", "method", "n", "d", "classes")} | {
        "splits": len(rows),
        "reported": fmean(row["reported"] for row in rows),
        "test": fmean(row["test"] for row in rows),
        "best": fmean(bests) if bests else None,
        "gap": fmean(gaps),
        "error": stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf,
        "width": fmean(row["upper"] - row["lower"] for row in rows),
        "coverage": fmean(map(_covered, rows)),
        "warned": warned,
        "warns": 2 * warned > len(rows),
        "kinds": dict(kinds),
        "seconds": fmean(row["seconds"] for row in rows),
    }


def _covered(row: Row) -> bool:
    return row["lower"] <= row["test"] <= row["upper"]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
