"""Independent random streams from one integer seed."""

import hashlib
import operator

import numpy as np
import torch

__all__ = ["check_seed", "generator"]


def check_seed(seed: int) -> int:
    """Return the seed as a Python integer.

    Raises:
        ValueError: if it is not a non-negative integer.
    """
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}; try seed=0")
    return value


def generator(seed: int, stream: str) -> torch.Generator:
    """Return a CPU generator for one named stream of random numbers.

    Streams of different names are independent under one seed, so that drawing more from one of
    them ("data") leaves the others ("initialisation", "probe") as they were.

    Args:
        seed: non-negative integer.
        stream: any name; equal names give equal streams on every machine.

    Raises:
        ValueError: if the seed is not a non-negative integer.

    Example:
        >>> from dd.data import generator
        >>> first, again = generator(0, "weights"), generator(0, "weights")
        >>> torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=again))
        True
    """
    # Python's own hash of a string changes from one process to the next.
    digest = hashlib.sha256(stream.encode()).digest()
    key = tuple(int(word) for word in np.frombuffer(digest, dtype="<u4"))
    sequence = np.random.SeedSequence(entropy=check_seed(seed), spawn_key=key)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
