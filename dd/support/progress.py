"""A progress bar for long computations of the library, where the user asks for one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(label: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar on by so many of ``total``; without ``show`` it is idle.

    Raises:
        ModuleNotFoundError: if a bar is asked for and rich is not installed.
    """
    if not show:
        yield lambda count: None
        return
    try:
        # Not at the top: `import dd` needs torch and numpy alone.
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs the package rich: pip install rich, or leave progress=False"
        ) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=15),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as display:
        task = display.add_task(label, total=total)
        yield lambda count: display.advance(task, count)
