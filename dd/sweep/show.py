"""What the jobs of a multirun have found, shown and written."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dd.sweep.table import Sweep, gather

__all__ = ["main", "show"]


def show(sweep: Sweep, console: Console | None = None) -> None:
    """Write table and picture of a multirun, and print the table."""
    # Imported here, because matplotlib would double the time to an error message.
    from dd.sweep.figure import draw

    console = console or Console()
    table, picture = sweep.write_csv(), draw(sweep)
    console.print(sweep.table())
    for failure in sweep.failures:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    for label, path in (("table", table), ("picture", picture)):
        console.print(f"{label}: {path}", soft_wrap=True, markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather the multirun that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.sweep", description="Gather the jobs of a multirun."
    )
    parser.add_argument("folder", type=Path, help="of the multirun")
    given = parser.parse_args(arguments)
    try:
        sweep = gather(given.folder)
        show(sweep)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if sweep.failures else 0)
