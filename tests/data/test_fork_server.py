"""Loader processes come from a process that has their imports, and no signal to a group ends them."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from typing import Any

import pytest

from lmssl.data import fork_server

pytestmark = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork here")


@pytest.fixture(autouse=True)
def no_server() -> None:
    """An earlier test of this process may have left one that imported other modules."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()


def _say(queue: Any) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    queue.put((blocked, {*fork_server._PRELOADED} <= {*sys.modules}))


def test_children_have_the_imports_and_outlive_signals_to_the_group() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    context = multiprocessing.get_context(fork_server.start())
    queue = context.Queue()
    child = context.Process(target=_say, args=(queue,))
    child.start()
    blocked, imported = queue.get(timeout=120)
    child.join()
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= blocked
    assert imported
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before  # of this process


def test_one_server_serves_all() -> None:
    from multiprocessing import forkserver

    assert fork_server.start() == fork_server.start() == "forkserver"
    assert forkserver._forkserver._forkserver_pid is not None
