"""What the jobs of a multirun have found, in one table and one picture.

``python -m dd.sweep outputs/xor/2026-01-31_12-00-00_sweep_ab12cd`` gathers them again.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dd.runs.folder import RunFolder, read_run
from dd.support.files import replacing
from dd.sweep.job import FILE, SweepJob, read_job
from dd.tracking.mark import mark

__all__ = [
    "FIGURES",
    "Sweep",
    "SweepRow",
    "gather",
    "job_folders",
    "settings_label",
    "short",
    "swept",
]

# Column of the table, and the key of summary.json that it takes.
FIGURES = {
    "test_error": "reported_test_error",
    "reported_error": "reported_error",
    "off_by": "reported_gap",
    "final_train_loss": "final_train_loss",
    "final_test_loss": "final_test_loss",
    "steps": "reported_step",
    "seconds": "fit_seconds",
}
SHOWN = ("test_error", "reported_error", "off_by", "seconds")


@dataclass(frozen=True)
class SweepRow:
    """One optimizer of one job, or a job that has no figures.

    Attributes:
        job: the job.
        optimizer: its name; empty where the job has no figures.
        figures: by the keys of :data:`FIGURES`; NaN where unknown.
        failed: why the job, or this optimizer in it, did not come to its end; empty where it did.
        run: what the job left in its folder; None where it has no figures.
        doubts: the mark on what this optimizer reports, where it is not to be believed.
    """

    job: SweepJob
    optimizer: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    run: RunFolder | None = None
    doubts: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the job came to its end, with or without this optimizer."""
        return self.run is not None and bool(self.run.provenance.get("finished", True))


@dataclass(frozen=True)
class Sweep:
    """All jobs of a multirun.

    Attributes:
        path: of its folder.
        keys: settings that differ between jobs, in the order of the command line.
        rows: in the order of the jobs.
    """

    path: Path
    keys: list[str]
    rows: list[SweepRow]

    @property
    def failures(self) -> list[str]:
        """A sentence on each job and optimizer that did not come to its end."""
        return [_failure(row) for row in self.rows if row.failed]

    @property
    def runs(self) -> list[RunFolder]:
        """What each job left that has figures."""
        return list(dict.fromkeys(row.run for row in self.rows if row.run is not None))

    @property
    def missing(self) -> list[str]:
        """A sentence on each job that has no figures."""
        return [_failure(row) for row in self.rows if row.run is None]

    def write_csv(self) -> Path:
        """Write ``sweep.csv``, whole or not at all, and return its path."""
        path = self.path / "sweep.csv"
        header = ["job", *self.keys, "optimizer", *FIGURES, "failed", "doubts"]
        with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for row in self.rows:
                settings = [row.job.overrides.get(key, "") for key in self.keys]
                figures = [row.figures.get(name, math.nan) for name in FIGURES]
                said = (row.failed, row.doubts)
                writer.writerow([row.job.number, *settings, row.optimizer, *figures, *said])
        return path

    def table(self) -> Table:
        """Return the table for a terminal."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        table.add_column("job", justify="right")
        for key in self.keys:
            table.add_column(key, justify="right")
        table.add_column("optimizer")
        for name in SHOWN:
            table.add_column(name.replace("_", " "), justify="right")
        for row in self.rows:
            settings = [short(row.job.overrides.get(key, "")) for key in self.keys]
            cells = [_number(row.figures.get(name, math.nan)) for name in SHOWN]
            said = filter(None, ("failed" if row.failed else "", row.doubts))
            name = " ".join([row.optimizer, *(f"({each})" for each in said)])
            table.add_row(str(row.job.number), *settings, name, *cells)
        return table


def gather(folder: Path) -> Sweep:
    """Read the jobs of a multirun; those that failed or are not through are rows as well.

    Args:
        folder: of the multirun.

    Raises:
        FileNotFoundError: if there are no jobs in it.
        ValueError: if a ``job.json`` is damaged, or the jobs are of several multiruns.
    """
    folders = job_folders(folder)
    if not folders:
        raise FileNotFoundError(
            f"{folder} holds no jobs; multiruns are outputs/<experiment>/<date>_<time>_sweep_..."
        )
    found = [(read_job(path), path) for path in folders]
    found.sort(key=lambda pair: (pair[0].number, str(pair[1])))
    for (job, path), (after, other) in pairwise(found):
        if job.number == after.number:
            raise ValueError(
                f"{path} and {other} are both job {job.number}: these are jobs of several "
                "multiruns; move those of each to a folder of its own"
            )
    rows = [row for job, path in found for row in _rows(job, path)]
    return Sweep(folder, swept([job for job, _ in found]), rows)


def job_folders(folder: Path) -> list[Path]:
    """Return the folders of jobs in that of a multirun, in the order of their names."""
    return sorted(path.parent for path in folder.rglob(FILE))


def swept(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the settings that differ between jobs; the seed where nothing else does."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def short(value: str) -> str:
    """Return a setting in a few characters, numbers to three digits."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def _failure(row: SweepRow) -> str:
    return f"job {row.job.number}: {row.failed}"


def settings_label(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    """Return the values of some settings in a line, under as short names as tell them apart."""
    lasts = [key.rpartition(".")[2] for key in keys]
    names = lasts if len(set(lasts)) == len(keys) else keys
    values = [short(settings.get(key, "")) for key in keys]
    return "  ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


def _rows(job: SweepJob, path: Path) -> list[SweepRow]:
    if not (path / "summary.json").is_file():
        return [SweepRow(job, failed=job.failed or f"{path} has no results: it is not through")]
    try:
        run = read_run(path)
    except (OSError, ValueError) as error:
        return [SweepRow(job, failed=job.failed or str(error))]
    return [_row(job, run, name) for name in run.optimizers]


def _row(job: SweepJob, run: RunFolder, name: str) -> SweepRow:
    summary = run.optimizers[name]
    figures = {column: _known(summary.get(key)) for column, key in FIGURES.items()}
    own = [f for f in run.provenance.get("failures", []) if f.split(":")[0].split(" ")[0] == name]
    if not own and not run.provenance.get("finished", True):
        own = [job.failed or "it did not come to its end"]
    return SweepRow(job, name, figures, "; ".join(own), run, mark(summary))


def _known(value: Any) -> float:
    return math.nan if value is None else float(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
