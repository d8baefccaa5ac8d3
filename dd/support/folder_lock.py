"""Keeps two processes from writing one run folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["FolderLocked", "folder_lock_of"]


class FolderLocked(FileExistsError):
    """The folder belongs to another run."""


@contextmanager
def folder_lock_of(folder: Path) -> Iterator[None]:
    """Hold a folder; the system lets go of it when the process ends, however it ends.

    Windows, which has no such locks, is left without.

    Raises:
        FolderLocked: if another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderLocked(f"the run in {folder} is still going on") from None
        except OSError:
            # Some network file systems have no locks.
            pass
        yield
    finally:
        os.close(handle)
