"""Waits that end soon after another thread cancels the work: pauses, locks on files, requests to servers."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_LOOK_SECONDS = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
Result = TypeVar("Result")


class Cancelled(Exception):
    """Work was interrupted from another thread; nothing was written."""


class Busy(Exception):
    """Another process holds the lock."""


def never() -> bool:
    """For work that nobody cancels."""
    return False


def check(cancelled: Callable[[], bool]) -> None:
    """Stop here if the work is cancelled.

    Raises:
        Cancelled: it is.
    """
    if cancelled():
        raise Cancelled


def pause(seconds: float, cancelled: Callable[[], bool]) -> None:
    """Sleep.

    Raises:
        Cancelled: before the time was over.
    """
    while seconds > 0:
        check(cancelled)
        time.sleep(min(seconds, _LOOK_SECONDS))
        seconds -= _LOOK_SECONDS


@contextmanager
def locked(
    path: Path,
    cancelled: Callable[[], bool],
    unsupported: Callable[[OSError], None] | None = None,
    *,
    wait: bool = True,
) -> Iterator[None]:
    """Hold a file's lock, which the kernel takes from a dead process.

    Args:
        unsupported: told where the file system has no locks, and then none is held; None: that is an error.
    Raises:
        Busy: it is not free, and `wait` is false.
        Cancelled: before the lock was free.
    """
    with path.open("a") as file:
        while True:
            check(cancelled)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not wait:
                    raise Busy from error
                time.sleep(_LOOK_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS or unsupported is None:
                    raise
                unsupported(error)
                break
        yield


def attended(work: Callable[[], Result], cancelled: Callable[[], bool]) -> Result:
    """Do what cannot be interrupted and leaves nothing behind, in a thread that is left to itself when cancelled.

    Raises:
        Cancelled: before it was done.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # raised again below
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="request", daemon=True)
    check(cancelled)
    thread.start()
    while thread.is_alive():
        check(cancelled)
        thread.join(_LOOK_SECONDS)
    return outcome.result(timeout=0)  # what is no `Exception` ended the thread: a timeout stands for it
