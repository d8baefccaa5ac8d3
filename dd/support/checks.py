"""Checks of single numbers that come from a user."""

import math
from typing import Any

__all__ = ["check_count", "check_number"]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Require an integer.

    Raises:
        ValueError: if ``value`` is not an integer of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Require a finite number that is not negative.

    Raises:
        ValueError: if ``value`` is no such number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number, finite and not negative, got {value!r}")
