"""Imports matplotlib under any MPLBACKEND."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["any_backend"]


@contextmanager
def any_backend() -> Iterator[None]:
    """Let matplotlib be imported whatever MPLBACKEND says, which is for windows and notebooks.

    Pictures are files here. A notebook's kernel hands its own backend to its children, whose
    matplotlib may not know it and would refuse to be imported. What it does know stays the choice
    for whoever opens windows later in this process.
    """
    named = os.environ.get("MPLBACKEND")
    if named is None or "matplotlib" in sys.modules:
        yield
        return
    del os.environ["MPLBACKEND"]
    try:
        yield
    finally:
        os.environ["MPLBACKEND"] = named
        if "matplotlib" in sys.modules:
            import matplotlib

            with suppress(ValueError):
                matplotlib.rcParams["backend"] = named
