"""``report.html``: what a run has found, on one page that needs no network."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs

import dd
from dd.data.reading import described
from dd.report.charts import HIDDEN, KINDS, SHAPES, chart, curves_of, styles_of_optimizers
from dd.report.words import GLOSSARY, best, is_tested, labels_of, verdicts
from dd.runs.folder import RunFolder, read_run
from dd.support.files import replacing
from dd.tracking.console import METHOD_COLUMNS, ROWS, number
from dd.tracking.console import method_cells as console_cells

__all__ = [
    "FILE",
    "GENERATOR",
    "Cell",
    "Row",
    "Table",
    "method_cells",
    "reading",
    "render",
    "write_report",
]

FILE = "report.html"
GENERATOR = "decoupled-descent"

CHOSEN = (("chosen learning rate", "chosen_lr"), ("chosen weight decay", "chosen_weight_decay"))
# What has a section of its own.
APART = ("data", "failures", "finished", "noise", "notes")
NAMES = {"dd_version": "dd"}
# Figures of the methods whose lowest value stands out.
COMPARED = ("reported_test_error", "reported_gap")

_pages = Environment(
    loader=PackageLoader("dd.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Curves in the order in which they are drawn.
_pages.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}


@dataclass(frozen=True)
class Cell:
    """One cell: its content, whether it is the best of its column, whether it is no number."""

    value: str
    best: bool = False
    text: bool = False


@dataclass(frozen=True)
class Row:
    """One row: its heading, and a cell for each column but the first."""

    head: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Headings of all columns, or none, and rows."""

    columns: Sequence[str]
    rows: Sequence[Row]


def write_report(
    folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        folder: of a run that has ended, or broke off.
        path: file to write; None is ``report.html`` in the folder.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file that runs write.
        OSError: if the file cannot be written.
        ValueError: if a file of the folder is not of the form that runs write.
    """
    run = read_run(folder)
    return render("run.html", run.path / FILE if path is None else Path(path), **_page(run))


def render(template: str, path: Path, **content: Any) -> Path:
    """Write a page from a template, whole or not at all, and return its path."""
    page = _pages.get_template(template).render(
        content,
        generator=f"{GENERATOR} {dd.__version__}",
        plotly=get_plotlyjs(),
        glossary=GLOSSARY,
        hidden=HIDDEN,
        dashes=KINDS,
        shapes=SHAPES,
    )
    with replacing(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path


def method_cells(figures: Mapping[str, Any], lowest: Mapping[str, bool]) -> list[Cell]:
    """Return the cells of an optimizer in the table of methods.

    Args:
        figures: of ``summary.json``.
        lowest: whether it is the best of all, for some figures.
    """
    cells = zip(METHOD_COLUMNS, console_cells(figures), strict=True)
    return [Cell(value, lowest.get(key, False)) for (_, key, _), value in cells]


def _page(run: RunFolder) -> dict[str, Any]:
    names = list(run.optimizers)
    labels = labels_of(names)
    looks = {labels[name]: look for name, look in styles_of_optimizers(names).items()}
    series = [each for name in names for each in curves_of(run, name, labels[name])]
    trials = max(len(run.history.trials(name)) for name in names)
    several = f", means over {trials} trials" if trials > 1 else ""
    return {
        "title": f"{run.config.name}: train and test error",
        "subtitle": f"{run.path.resolve().name}, {', '.join(names)}",
        "read": _read(run),
        "finished": run.provenance.get("finished", True),
        "failures": run.results.failures,
        "headline": _headline(run),
        "verdicts": verdicts(run),
        "looks": looks,
        "means": several,
        "methods": _methods(run),
        "chart": chart(series, looks) if series else None,
        "has_charts": bool(series),
        "reading": reading(several=trials > 1, tested=is_tested(run)),
        "description": f"Errors and losses of {', '.join(looks)} against steps, on training and "
        "test samples; the tables hold the figures.",
        "figures": _figures(run),
        "notes": run.results.notes,
        "noise": [f"{name}: {line}" for name, line in run.results.noise.items()],
        "config": OmegaConf.to_yaml(run.config),
        "provenance": _provenance(run),
    }


def _read(run: RunFolder) -> Table | None:
    """What was read of a user's files; None for other data, and runs of earlier versions."""
    reading = run.provenance.get("data")
    if not reading:
        return None
    rows = [Row(label, [Cell(words, text=True)]) for label, words in described(reading)]
    return Table([], rows)


def _headline(run: RunFolder) -> str:
    if not is_tested(run):
        return "There are no test samples, so nothing that is reported can be checked."
    lowest = best(run.optimizers, ["reported_test_error"]).get("reported_test_error")
    if lowest is None:
        return ""
    error = number(run.optimizers[lowest], "reported_test_error", 3)
    return f"The lowest test error is {error}, of {labels_of(run.optimizers)[lowest]}."


def _methods(run: RunFolder) -> Table:
    lowest = best(run.optimizers, COMPARED)
    rows = [
        Row(name, method_cells(own, {key: holder == name for key, holder in lowest.items()}))
        for name, own in run.optimizers.items()
    ]
    return Table(["optimizer", *(label for label, _, _ in METHOD_COLUMNS)], rows)


def _figures(run: RunFolder) -> Table:
    summaries = run.optimizers.values()
    rows = [Row(label, [Cell(cell(own)) for own in summaries]) for label, cell in ROWS]
    for label, key in CHOSEN:
        if any(own.get(key) is not None for own in summaries):
            rows.append(Row(label, [Cell(number(own, key, 4)) for own in summaries]))
    return Table(["", *run.optimizers], rows)


def _provenance(run: RunFolder) -> Table:
    rows = [
        Row(NAMES.get(key, key), [Cell(str(value), text=True)])
        for key, value in run.provenance.items()
        if key not in APART
    ]
    return Table([], rows)


def reading(*, several: bool, tested: bool) -> str:
    """Say how to read the curves.

    Args:
        several: whether there are several trials.
        tested: whether there are test samples.
    """
    lines = (
        "Test curves are solid, training curves dashed."
        if tested
        else "There are no test samples, so there are no test curves; training curves are dashed."
    )
    bands = " Lines are medians over trials, bands their quartiles." if several else ""
    return (
        f"{lines} Point at a line, or tap it, for its values; with a mouse, drag to enlarge, and "
        f"double-click for everything.{bands}"
    )
