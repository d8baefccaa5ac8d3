"""What Hydra calls when a multirun begins and when it has ended."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dd.experiments.sweep_study import bind_study
from dd.support.folder_lock import FolderLocked, folder_lock_of
from dd.sweep.job import read_job
from dd.sweep.show import show
from dd.sweep.table import Sweep, gather, job_folders

__all__ = ["Gather", "conclude", "failures"]

# Sentences on jobs that could not be done, wherever they ran.
failures: list[str] = []

# Of the multirun that is going on, if there is one.
_going_on: list[DictConfig] = []
_held = ExitStack()


class Gather(Callback):
    """Gathers the jobs of a multirun into a table, a picture and a report."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a folder that holds another multirun, and a study of other settings.

        Raises:
            SystemExit: if there is one; Hydra takes any other error of a callback for a warning.
        """
        folder = Path(config.hydra.sweep.dir)
        try:
            _claim(folder)
            bind_study(config)
        # Hydra would only warn of it, and begin.
        except Exception as error:
            # Optuna fails without a word where a storage and it do not fit.
            sys.exit(f"error: {str(error) or repr(error)}")
        _going_on.append(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print them; their failures are kept in :data:`failures`."""
        conclude()


def conclude() -> None:
    """Gather the multirun that is going on, whether or not all of its jobs have begun."""
    if not _going_on:
        return
    config = _going_on.pop()
    folder = Path(config.hydra.sweep.dir)
    try:
        sweep = gather(folder)
        show(sweep)
    # Hydra would only warn of it, and the exit code would be that of a success.
    except Exception as error:
        failures.append(f"the jobs of {folder} could not be gathered: {error}")
        sys.stderr.write(failures[-1] + "\n")
        return
    if config.tracking.report:
        _report(sweep)
    searches = not config.hydra.sweeper["_target_"].endswith(".BasicSweeper")
    # To diverge is an answer that a search asks for.
    rows = [row for row in sweep.rows if not (searches and row.has_ended)]
    failures.extend(replace(sweep, rows=rows).failures)
    if searches and all(row.failed for row in sweep.rows):
        failures.append("no job of the search came to its end")
        sys.stderr.write(failures[-1] + "\n")


def _claim(folder: Path) -> None:
    """Take the folder of a multirun.

    Raises:
        FolderLocked: if it holds jobs already.
    """
    held = job_folders(folder)
    if held:
        job = read_job(held[0])
        settings = " ".join(f"{key}={value}" for key, value in job.overrides.items())
        raise FolderLocked(
            f"{folder} holds the {len(held)} jobs of another multirun (job {job.number}: "
            f"{settings}), whose results would stand among those of this one. Choose another "
            f"folder with hydra.sweep.dir=...; python -m dd.sweep {folder} gathers what is there, "
            "and resume=... goes on with a job that was interrupted"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _held.enter_context(folder_lock_of(folder))


def _report(sweep: Sweep) -> None:
    """Write a report that compares the jobs; there is nothing to lose by a failure any more."""
    try:
        # Imported here, because the jobs of a parallel launcher need none of it.
        from dd.report.comparison import write_sweep_report

        path = write_sweep_report(sweep)
    except Exception as error:
        sys.stderr.write(f"the report of {sweep.path} could not be written: {error}\n")
    else:
        sys.stdout.write(f"report: {path}\n")
