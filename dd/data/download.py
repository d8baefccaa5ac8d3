"""What every download needs: an end to the waiting, and one sentence when it fails."""

import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

__all__ = ["FAILURES", "one_line", "socket_timeout"]

TIMEOUT_SECONDS = 30.0

# What torchvision's and torch.hub's downloads raise, on the way and when the file is not whole.
FAILURES = (EOFError, HTTPException, OSError, RuntimeError, tarfile.TarError)


@contextmanager
def socket_timeout() -> Iterator[None]:
    """Give up on a silent server: torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def one_line(error: BaseException) -> str:
    """Return an error's type and the beginning of its message on one line."""
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
