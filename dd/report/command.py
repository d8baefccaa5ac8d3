"""``python -m dd.report outputs/xor/...``: writes the report of a run, or one of several runs.

One folder of a run: its ``report.html`` is written again. Several, or that of a multirun, which
stands for its jobs: one page that compares them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from dd.report.comparison import write_comparison, write_sweep_report
    from dd.report.page import FILE, GENERATOR, write_report
    from dd.runs.folder import RunFolder, read_run
    from dd.sweep.table import Sweep, gather, job_folders
except ModuleNotFoundError as error:
    sys.exit(
        f"python -m dd.report needs the package {error.name!r}: pip install "
        "'decoupled-descent[experiments]'"
    )

__all__ = ["main", "report"]


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run or multirun, or one that compares several.

    Args:
        folders: one or more.
        output: file to write; None is ``report.html`` in the folder if it is one, in the folder
            right above all of them if they share it, and in the current directory otherwise.

    Returns:
        Path of the file.

    Raises:
        FileExistsError: if the file is there and no report.
        FileNotFoundError: if a folder is none of a run or multirun.
        OSError: if the file cannot be written.
        ValueError: if a run is named twice, or its files are damaged.
    """
    path = _target(folders) if output is None else output
    _refuse_foreign(path)
    found = [_read(folder) for folder in folders]
    if len(found) == 1:
        (only,) = found
        if isinstance(only, Sweep):
            return write_sweep_report(only, path)
        return write_report(only.path, path)
    runs = [run for each in found for run in (each.runs if isinstance(each, Sweep) else [each])]
    _refuse_twins(runs)
    missing = [
        f"{each.path.resolve().name}, {sentence}"
        for each in found
        if isinstance(each, Sweep)
        for sentence in each.missing
    ]
    return write_comparison(runs, path, "Comparison of runs", missing)


def _read(folder: Path) -> RunFolder | Sweep:
    is_multirun = not (folder / "summary.json").is_file() and bool(job_folders(folder))
    return gather(folder) if is_multirun else read_run(folder)


def _target(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / FILE
    above = {folder.resolve().parent for folder in folders}
    return (above.pop() if len(above) == 1 else Path()) / FILE


def _refuse_foreign(path: Path) -> None:
    """Refuse to overwrite a file that is no report.

    Raises:
        FileExistsError: if there is one.
    """
    if path.exists() and GENERATOR not in _beginning(path):
        raise FileExistsError(
            f"{path} is there, and no report of this program; name another file with --output"
        )


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1000).decode("utf-8", "replace")


def _refuse_twins(runs: Sequence[RunFolder]) -> None:
    """Refuse runs of one folder.

    Raises:
        ValueError: if there are any.
    """
    seen: set[Path] = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise ValueError(f"{run.path} is named twice; name each run once")
        seen.add(run.path.resolve())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.report",
        description="Write the report of a run, or one that compares several runs.",
    )
    parser.add_argument("folders", type=Path, nargs="+", help="of runs or multiruns")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write (default: report.html in the folder, or in the one above several)",
    )
    given = parser.parse_args(arguments)
    try:
        path = report(given.folders, given.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"report: {path}\n")
