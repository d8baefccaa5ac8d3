"""The mark on figures that are not to be believed."""

from collections.abc import Mapping
from typing import Any

__all__ = ["MARK", "mark"]


MARK = "not to be believed"


def mark(figures: Mapping[str, Any]) -> str:
    """Return the mark of an optimizer's figures, empty where nothing speaks against them.

    Args:
        figures: of ``summary.json``.
    """
    if not figures.get("doubts"):
        return ""
    trials = figures.get("per_trial", ())
    if not trials:
        return MARK
    doubted = sum(bool(own.get("doubts")) for own in trials)
    return f"{MARK} in {doubted} of {len(trials)} trials"
