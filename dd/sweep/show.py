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
    console = console or Console()
    table = sweep.write_csv()
    console.print(sweep.table())
    said = [("failed", failure) for failure in sweep.failures]
    for label, what in (*said, ("table", table), ("picture", _drawn(sweep))):
        console.print(f"{label}: {what}", soft_wrap=True, markup=False, highlight=False)


def _drawn(sweep: Sweep) -> Path | str:
    """Path of the picture, or why there is none, which costs nothing else."""
    try:
        # Imported here, because matplotlib would double the time to an error message.
        from dd.sweep.figure import draw

        return draw(sweep)
    except Exception as error:
        return f"could not be drawn: {error}"


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
