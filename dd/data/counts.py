"""How many samples of those there are to take."""

__all__ = ["sample_count"]


def sample_count(name: str, asked: int | None, available: int, noun: str, remedy: str) -> int:
    """Return how many samples to take: ``asked``, or all that are available for None.

    Args:
        name: the argument's name, for the error.
        asked: how many, or None.
        available: how many there are.
        noun: what the samples are called, in the plural.
        remedy: what else could be done where there are too few.

    Raises:
        ValueError: if that is no positive integer, or more than there are.
    """
    if asked is None:
        asked = available
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(
            f"{name} must be a positive integer, or None for all {available} {noun}, got {asked!r}"
        )
    if asked > available:
        raise ValueError(
            f"{name}={asked} asks for more {noun} than there are: {available} can be used; "
            f"lower num_train or num_test, or {remedy}"
        )
    return asked
