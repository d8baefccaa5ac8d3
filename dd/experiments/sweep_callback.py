"""What Hydra calls when a multirun has ended."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dd.sweep.show import show
from dd.sweep.table import Sweep, gather

__all__ = ["Gather", "failures"]

# Sentences on jobs that could not be done, wherever they ran.
failures: list[str] = []


class Gather(Callback):
    """Gathers the jobs of a multirun into a table, a picture and a report."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print them; their failures are kept in :data:`failures`."""
        folder = Path(config.hydra.sweep.dir)
        try:
            sweep = gather(folder)
            show(sweep)
        except (OSError, ValueError) as error:
            failures.append(f"the jobs of {folder} could not be gathered: {error}")
            sys.stderr.write(failures[-1] + "\n")
            return
        if config.tracking.get("report", True):
            _report(sweep)
        searches = not config.hydra.sweeper["_target_"].endswith(".BasicSweeper")
        # To diverge is an answer that a search asks for.
        rows = [row for row in sweep.rows if not (searches and row.optimizer)]
        failures.extend(replace(sweep, rows=rows).failures)


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
