"""Signals that stop a run: SIGTERM and SIGUSR1 of schedulers, SIGINT of the keyboard."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_PRESS_SECONDS = 0.3
"""Launchers forward a Ctrl-C that the terminal has sent already; a person is slower."""


class StoppedAtOnce(BaseException):
    """A signal came while there was nothing to save; no `Exception`, so that nobody on the way takes it for one."""


class StopFlag:
    """Set by the first signal; the loop reads it at every micro-batch. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.at_once = True
        """Whether a signal ends the run where it is: until its first step there is nothing to save."""
        self._interruptible = False
        self._interrupted_at: float | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            KeyboardInterrupt: the second SIGINT, or one before the first step.
            StoppedAtOnce: another signal before the first step, or one during a wait; not twice.
        """
        first, self.requested = not self.requested, True
        if number == signal.SIGINT:
            now, before = time.monotonic(), self._interrupted_at
            self._interrupted_at = now if before is None else before
            if self.at_once or (before is not None and now - before > _SAME_PRESS_SECONDS):
                raise KeyboardInterrupt
        if (self.at_once and first) or self._interruptible:
            self._interruptible = False
            raise StoppedAtOnce

    def request(self) -> None:
        """Ask for a stop without a signal."""
        self.requested = True

    @contextmanager
    def interrupting(self, *, enabled: bool = True) -> Iterator[None]:
        """Where a signal ends a wait that could be long."""
        self._interruptible = enabled
        try:
            yield
        finally:
            self._interruptible = False


@contextmanager
def handling(flag: StopFlag) -> Iterator[None]:
    """Lets the flag handle the signals for the duration; later ones are as before."""
    previous = {number: signal.signal(number, flag) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Notes each Ctrl-C: a library that is being imported may make another error of the KeyboardInterrupt."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a job in the background does not hear it
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
