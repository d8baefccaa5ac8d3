"""Train and eval modes of a module's parts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Put every part of a module back in its own mode at the end."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        # Not train(): parametrised children keep their mode.
        for part, mode in modes:
            part.training = mode
