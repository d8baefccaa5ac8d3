"""What a run shows in the terminal: a progress bar while it trains, a table when it is done."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from dd.data.reading import described
from dd.tracking.history import Record
from dd.tracking.mark import mark

__all__ = [
    "METHOD_COLUMNS",
    "ROWS",
    "ProgressDisplay",
    "comparison",
    "method_cells",
    "number",
    "print_reading",
    "print_report",
]

# Characters of an optimizer's column.
WIDTH = 16


class ProgressDisplay:
    """One progress bar for each optimizer; use as a context manager.

    Where the output is no terminal, each bar is printed once, at the end.

    Args:
        console: where to draw; None is the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Lay out the columns."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=15),
            MofNCompleteColumn(),
            TextColumn("train error {task.fields[train]}"),
            TextColumn("test error {task.fields[test]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressDisplay":
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Draw once more and stop."""
        self._progress.stop()

    def start(self, name: str, label: str, steps: int) -> TaskID:
        """Start the bar of an optimizer, over again with every trial, and return its handle."""
        if name in self._tasks:
            self._progress.reset(
                self._tasks[name], total=steps, description=label, train="-", test="-"
            )
        else:
            self._tasks[name] = self._progress.add_task(label, total=steps, train="-", test="-")
        return self._tasks[name]

    def update(self, task: TaskID, record: Record, completed: int | None = None) -> None:
        """Move a bar to the record's step, or to ``completed``, and show its errors."""
        self._progress.update(
            task,
            completed=record.step if completed is None else completed,
            train=f"{record.train_error:.3f}",
            test="-" if math.isnan(record.test_error) else f"{record.test_error:.3f}",
        )

    def finish(self, task: TaskID) -> None:
        """Let a bar end at the step where it is."""
        (done,) = [known.completed for known in self._progress.tasks if known.id == task]
        self._progress.update(task, total=done)


def print_reading(reading: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what was read of a user's files.

    Args:
        reading: what :meth:`dd.data.reading.Reading.as_dict` returned.
        console: where to print; None is the standard output.
    """
    table = Table(box=SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for label, words in described(reading):
        # What files call their columns is no markup.
        table.add_row(Text(label), Text(words))
    (console or Console()).print(table)


def print_report(
    summaries: Mapping[str, Mapping[str, Any]],
    figure: str | None = None,
    notes: Sequence[str] = (),
    console: Console | None = None,
    noise: Mapping[str, str] | None = None,
    report: str | None = None,
) -> None:
    """Print the optimizers side by side, what else is worth knowing, and where to see more.

    Args:
        summaries: figures of ``summary.json`` for each optimizer's name.
        figure: path of the picture, if there is one.
        notes: sentences to print below the table.
        console: where to print; None is the standard output.
        noise: a line on the noise model, for the names of decoupled optimizers.
        report: path of the report, if there is one.
    """
    console = console or Console()
    names, most = list(summaries), _columns(console.width)
    for first in range(0, len(names), most):
        console.print(comparison({name: summaries[name] for name in names[first : first + most]}))
    console.print(methods(summaries))
    for name, line in (noise or {}).items():
        console.print(f"{name}: {line}", markup=False, highlight=False)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    for kind, path in (("picture", figure), ("report", report)):
        if path is not None:
            console.print(f"{kind}: {path}", soft_wrap=True, markup=False, highlight=False)


def methods(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of one row an optimizer: the error it reaches, what it says, what it takes."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("optimizer")
    for label, _, _ in METHOD_COLUMNS:
        table.add_column(label, justify="right")
    for name, summary in summaries.items():
        table.add_row(name, *map(_wrapped, method_cells(summary)))
    return table


def method_cells(summary: Mapping[str, Any]) -> list[str]:
    """Return the cells of an optimizer in the table of methods, the mark on what it reports."""
    return [
        _marked(number(summary, key, digits), summary)
        if key == "reported_error"
        else number(summary, key, digits)
        for _, key, digits in METHOD_COLUMNS
    ]


def _marked(figure: str, summary: Mapping[str, Any]) -> str:
    """A figure, and on lines of its own that it is not to be believed."""
    return "\n".join(filter(None, (figure, mark(summary))))


def _wrapped(cell: str) -> str:
    """A cell whose mark is no wider than a column."""
    figure, *marks = cell.splitlines()
    return "\n".join([figure, *(part for line in marks for part in textwrap.wrap(line, WIDTH))])


def _columns(width: int) -> int:
    """How many optimizers fit beside the labels in so many characters."""
    return max(1, (width - 32) // WIDTH)


def comparison(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of one row a figure and one column an optimizer, means over trials."""
    trials = max((len(s.get("per_trial", "1")) for s in summaries.values()), default=1)
    table = Table(
        title=f"means over {trials} trials" if trials > 1 else None,
        # So that three optimizers fit into 80 characters.
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("")
    for name, summary in summaries.items():
        completed = summary.get("completed_trials", trials)
        part = "" if completed == trials else f"\n({completed} of {trials} completed)"
        label = name.upper().replace("_", " ") + part
        table.add_column(label, justify="right", no_wrap=True)
    for label, cell in ROWS:
        table.add_row(label, *(_wrapped(cell(summary)) for summary in summaries.values()))
    return table


def _pair(first: str, second: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: f"{number(summary, first, 4)} / {number(summary, second, 4)}"


def _between(lower: str, upper: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(summary: Mapping[str, Any]) -> str:
        if lower not in summary:
            return "-"
        return _marked(f"{number(summary, lower, 3)} to {number(summary, upper, 3)}", summary)

    return cell


def _at_step(value: str, step: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(summary: Mapping[str, Any]) -> str:
        found = number(summary, value, 4)
        return found if found == "-" else f"{found} (step {number(summary, step, 0)})"

    return cell


def _single(key: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: number(summary, key, digits)


def number(summary: Mapping[str, Any], key: str, digits: int) -> str:
    """Return a figure in so many digits after the point, or "-" where it is unknown."""
    value = summary.get(key)
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("final error, train/test", _pair("final_train_error", "final_test_error")),
    ("90% interval of it, tracked", _between("final_error_lower", "final_error_upper")),
    ("final loss, train/test", _pair("final_train_loss", "final_test_loss")),
    ("best test error", _at_step("best_test_error", "best_test_step")),
    ("test error at lowest train error", _at_step("selected_test_error", "selected_step")),
    ("mean |train-test| error", _single("mean_error_gap", 4)),
    ("mean |train-test| loss", _single("mean_loss_gap", 4)),
    ("steps", _single("steps", 0)),
    ("seconds", _single("seconds", 1)),
    ("steps per second", _single("steps_per_second", 1)),
)

# Label, figure, digits.
METHOD_COLUMNS = (
    ("test error", "reported_test_error", 4),
    ("reported", "reported_error", 4),
    ("off by", "reported_gap", 4),
    ("seconds", "fit_seconds", 1),
    ("passes", "passes", 0),
    ("samples", "samples", 0),
)
