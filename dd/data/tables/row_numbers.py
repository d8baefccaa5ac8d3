"""Columns that tell rows apart and nothing of what they hold: row numbers, indices, identifiers."""

import re

import numpy as np
import numpy.typing as npt

__all__ = ["is_nameless", "looks_like_identifier", "row_number"]

# Of fewer rows small integers may all differ by chance: for 20 of them below 20 that is 2e-8.
FEWEST = 20
# What pandas, R, readr and Spark call a column that has no name.
NAMELESS = re.compile(
    r"|unnamed[:_. ]*\d*(_level_\d+)?|__index_level_\d+__|level_\d+|\.\.\.\d+|_c\d+"
)
IDENTIFIER = re.compile(
    r"(?i:(row|sample|record)?[_ .-]?(id|idx|index|number|nr|no)|rowname(s)?|uuid|guid)"
    r"|.*[_ .-](?i:id|idx|index|uuid|guid)|.*[a-z]I[dD]"
)


def is_nameless(name: str) -> bool:
    """Whether a column was written without a name."""
    return NAMELESS.fullmatch(name.strip().lower()) is not None


def looks_like_identifier(name: str) -> bool:
    """Whether a column has the name of an identifier."""
    return IDENTIFIER.fullmatch(name.strip()) is not None


def row_number(name: str, values: npt.NDArray[np.float64]) -> str | None:
    """Say why a column numbers the rows; None where it does not.

    Args:
        name: of the column; "" where columns have no names of their own.
        values: shape (n,).
    """
    n = len(values)
    low, high = values.min(), values.max()
    counts = high - low == n - 1
    named = bool(name) and (is_nameless(name) or looks_like_identifier(name))
    if not (counts or named) or not bool((values == np.floor(values)).all()):
        return None
    if len(np.unique(values)) < n:
        return None
    if counts and n >= FEWEST:
        return f"row numbers, {low:.0f} to {high:.0f}"
    if not named:
        return None
    if is_nameless(name):
        return "an index, integers that all differ in a column without a name"
    return "an identifier, integers that all differ"
