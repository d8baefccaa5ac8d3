"""Signals that end a process, as the keyboard's interrupt does: with its results written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption", "exit_code", "interruptible"]

# What batch systems, terminals and resource limits send to end a process.
NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Interruption(KeyboardInterrupt):
    """A signal that would have ended the process at once.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interruption` for the signals that would end the process meanwhile.

    A signal that somebody handles or ignores, as ``nohup`` and submitit do, is left alone, and so
    are all of them outside of the main thread.
    """
    held = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        held = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in held:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, signal.SIG_DFL)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a process that a signal ended, 128 and its number."""
    number = interrupt.number if isinstance(interrupt, Interruption) else signal.SIGINT
    return 128 + number


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interruption(number)
