"""The process that others are forked from: it imports what they need while the main process goes on.

A process that starts from nothing takes seconds for its imports, and a forked child of the main process would
inherit the locks of its threads. The server has no threads, and ends when the main process does.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence

_PRELOADED = ("lmssl.data.batch", "lmssl.objective.base")
"""What unpickling a loader's work imports."""


def start(preloaded: Sequence[str] = _PRELOADED) -> str:
    """Start it, unless it runs; returns the start method of processes: `spawn` on systems that have no fork.

    `preloaded`: the modules that it imports, those that are not installed left out.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # first, for when it starts it unblocks signals
    forkserver.set_forkserver_preload([*preloaded])
    # A signal to the whole group must not end loading while the main process still saves. Children inherit the mask,
    # and it holds from the first moment, when a handler would not be there yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return "forkserver"
