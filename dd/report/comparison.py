"""One page that holds several runs against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dd.report.charts import Chart, Look, chart, curves_of, styles_of_runs
from dd.report.page import COMPARED, FILE, Cell, Row, Table, method_cells, reading, render
from dd.report.settings import differing_settings
from dd.report.words import best, is_tested, labels_of
from dd.runs.folder import RunFolder
from dd.sweep.table import Sweep, settings_label
from dd.tracking.console import METHOD_COLUMNS

__all__ = ["write_comparison", "write_sweep_report"]

# Curves of more runs cannot be told apart.
MOST_RUNS = 16
# Settings that name a run, where there are no more.
MOST_NAMED = 3
PROVENANCE = ("experiment", "seed", "trials", "device", "torch", "dd_version")
# What is held against each other; the rest is on the page of each run.
KINDS = ("test", "train")


@dataclass(frozen=True)
class _Overlay:
    """Curves of one optimizer in several runs."""

    name: str
    chart: Chart
    note: str
    description: str


def write_comparison(
    runs: Sequence[RunFolder], path: Path, title: str, failures: Sequence[str] = ()
) -> Path:
    """Write a page on several runs, whole or not at all, and return its path.

    Args:
        runs: one or more, in the order in which they are listed.
        path: file to write.
        title: of the page.
        failures: sentences on what is missing among them.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are no runs.
    """
    if not runs:
        raise ValueError(" ".join(["there are no runs with results to compare:", *failures]))
    keys, settings = differing_settings(runs)
    named = dict(zip(_labels(runs, keys, settings), runs, strict=True))
    overlays = _overlays(named)
    several = any(run.config.get("trials", 1) > 1 for run in runs)
    return render(
        "comparison.html",
        path,
        title=title,
        subtitle=f"{len(runs)} runs" if len(runs) > 1 else "one run",
        failures=[*failures, *_sentences(named, "failures"), *_unfinished(named)],
        caution=_caution(runs),
        methods=_methods(named, keys, settings),
        overlays=overlays,
        has_charts=bool(overlays),
        reading=reading(several=several, tested=any(map(is_tested, runs))),
        notes=_sentences(named, "notes"),
        provenance=_provenance(named),
    )


def write_sweep_report(sweep: Sweep, path: Path | None = None) -> Path:
    """Write the page that compares the jobs of a multirun, by default into its folder.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if no job has results.
    """
    path = sweep.path / FILE if path is None else path
    return write_comparison(sweep.runs, path, sweep.path.resolve().name, sweep.missing)


def _labels(
    runs: Sequence[RunFolder], keys: Sequence[str], settings: Sequence[Mapping[str, str]]
) -> list[str]:
    """A label for each run that no other one has: its settings, its folder's name, or its path."""
    found = [settings_label(own, keys) for own in settings]
    if 0 < len(keys) <= MOST_NAMED and len(set(found)) == len(runs):
        return found
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.path) for run in runs]


def _overlays(named: Mapping[str, RunFolder]) -> list[_Overlay]:
    looks = styles_of_runs(list(named))
    labels = labels_of(name for run in named.values() for name in run.optimizers)
    found = (_overlay(named, looks, name, label) for name, label in labels.items())
    return [overlay for overlay in found if overlay is not None]


def _overlay(
    named: Mapping[str, RunFolder], looks: Mapping[str, Look], name: str, called: str
) -> _Overlay | None:
    having = {label: run for label, run in named.items() if name in run.optimizers}
    shown = sorted(having, key=lambda label: _reported(having[label], name))[:MOST_RUNS]
    series = [
        each
        for label, run in having.items()
        if label in shown
        for each in curves_of(run, name, label)
        if each.kind in KINDS
    ]
    if not series:
        return None
    note = (
        f"Of {len(having)} runs, those {MOST_RUNS} of the lowest reported error are drawn."
        if len(having) > MOST_RUNS
        else ""
    )
    description = (
        f"Errors and losses of {name} against steps in several runs; the table has figures."
    )
    return _Overlay(f"{called} ({name})", chart(series, looks), note, description)


def _reported(run: RunFolder, name: str) -> float:
    error = run.optimizers[name].get("reported_error")
    return float("inf") if error is None else float(error)


def _methods(
    named: Mapping[str, RunFolder], keys: Sequence[str], settings: Sequence[Mapping[str, str]]
) -> Table:
    figures = {
        (label, name): own for label, run in named.items() for name, own in run.optimizers.items()
    }
    # Errors on different data are not held against each other.
    lowest = {} if _caution(list(named.values())) else best(figures, COMPARED)
    own_settings = dict(zip(named, settings, strict=True))
    rows = []
    for (label, name), own in figures.items():
        is_best = {key: holder == (label, name) for key, holder in lowest.items()}
        differ = [Cell(own_settings[label].get(key, "-")) for key in keys]
        rows.append(Row(label, [Cell(name, text=True), *method_cells(own, is_best), *differ]))
    return Table(["run", "optimizer", *(label for label, _, _ in METHOD_COLUMNS), *keys], rows)


def _provenance(named: Mapping[str, RunFolder]) -> Table:
    rows = [
        Row(
            label,
            [
                Cell(run.path.resolve().name, text=True),
                *(Cell(str(run.provenance.get(key, "-")), text=True) for key in PROVENANCE),
            ],
        )
        for label, run in named.items()
    ]
    return Table(["run", "folder", *(key.removesuffix("_version") for key in PROVENANCE)], rows)


def _sentences(named: Mapping[str, RunFolder], kind: str) -> list[str]:
    return [
        f"{label}: {sentence}"
        for label, run in named.items()
        for sentence in getattr(run.results, kind)
    ]


def _unfinished(named: Mapping[str, RunFolder]) -> list[str]:
    return [
        f"{label}: this run did not come to its end"
        for label, run in named.items()
        if not run.provenance.get("finished", True)
    ]


def _caution(runs: Sequence[RunFolder]) -> str:
    experiments = list(dict.fromkeys(str(run.config.name) for run in runs))
    if len(experiments) == 1:
        return ""
    return (
        f"These runs are of different experiments ({', '.join(experiments)}). Their data differ, "
        "so an error of one says nothing of an error of another."
    )
