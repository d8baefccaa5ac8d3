"""Names in a message, the first of many."""

from collections.abc import Callable, Sequence

__all__ = ["listed"]


def listed(names: Sequence[str], most: int = 8, written: Callable[[str], str] = repr) -> str:
    """Return names with commas between them, and how many more there are.

    Args:
        names: any number of them.
        most: that are written.
        written: how each is.
    """
    more = "" if len(names) <= most else f" and {len(names) - most} more"
    return ", ".join(map(written, names[:most])) + more
