"""Downloads that are stopped while a server fails, hangs, or another process downloads."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lmssl.data import remote as module
from lmssl.data.batch import training_batches
from lmssl.data.cancel import Cancelled, locked, never
from lmssl.data.remote import RemoteFiles, RemotePath
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import JsonlCorpus
from runs import write_lines

LONG_SECONDS = 3600.0
WAIT_SECONDS = 60
"""Far more than a stop takes, and far less than what it interrupts."""


@pytest.fixture
def cancel() -> threading.Event:
    return threading.Event()


@pytest.fixture
def files(tmp_path: Path, cancel: threading.Event) -> RemoteFiles:
    times = dict.fromkeys(("give_up_seconds", "first_wait_seconds", "silence_seconds"), LONG_SECONDS)
    return RemoteFiles(tmp_path / "remote", 10**6, **times, cancelled=cancel.is_set)


@pytest.fixture
def path(tmp_path: Path, files: RemoteFiles) -> RemotePath:
    (tmp_path / "a.txt").write_bytes(b"text")
    (found,) = files.list_files((tmp_path / "a.txt").as_uri(), lambda name: True)
    return found


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[], threading.Event]:
    """`fail()`: from now on every request for content fails, and the event tells of the first."""

    def begin() -> threading.Event:
        asked = threading.Event()

        def refuse(*_: Any, **__: Any) -> bytes:
            asked.set()
            raise ConnectionError("an outage")

        monkeypatch.setattr(fsspec.get_filesystem_class("file"), "cat_file", refuse)
        return asked

    return begin


def ending(work: Callable[[], Any], begun: Callable[[], Any], stop: Callable[[], Any]) -> BaseException | None:
    """What ends the work of a thread that is stopped after it began; None: nothing did."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun()
    assert thread.is_alive()
    stop()
    thread.join(WAIT_SECONDS)
    return raised[0] if raised else None


def read(path: RemotePath) -> bytes:
    with path.files.open(path) as file:
        return file.read()


def test_an_outage(path: RemotePath, cancel: threading.Event, fail: Callable[[], threading.Event]) -> None:
    asked = fail()
    ended = ending(lambda: read(path), lambda: asked.wait(WAIT_SECONDS), cancel.set)
    assert isinstance(ended, Cancelled) and not list(path.files.folder.glob("*a.txt"))


def test_a_server_that_hangs(files: RemoteFiles, cancel: threading.Event) -> None:
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.txt"
        connected: list[socket.socket] = []
        ended = ending(
            lambda: files.list_files(url, lambda name: True),
            lambda: connected.append(listening.accept()[0]),
            cancel.set,
        )
        connected[0].close()
    assert isinstance(ended, Cancelled)


def test_a_download_of_another_process(path: RemotePath, cancel: threading.Event) -> None:
    files = path.files
    files.folder.mkdir()
    place, begun = files._place(path, 0), threading.Event()

    def work() -> None:
        begun.set()
        read(path)

    with locked(files.folder / f".lock-{place.name[:2]}", never):
        ended = ending(work, lambda: begun.wait(WAIT_SECONDS), cancel.set)
    assert isinstance(ended, Cancelled)
    cancel.clear()
    assert read(path) == b"text"


def test_another_process_is_not_stopped(path: RemotePath, cancel: threading.Event) -> None:
    cancel.set()
    assert path.files.cancelled() and not pickle.loads(pickle.dumps(path)).files.cancelled()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops(
    tmp_path: Path, open_stream: Any, texts: Any, monkeypatch: pytest.MonkeyPatch, fail: Any, workers: int
) -> None:
    monkeypatch.setitem(module.PACKAGES, "file", "fsspec")
    (tmp_path / "far").mkdir()
    for number in range(8):
        write_lines(tmp_path / "far" / f"{number}.jsonl", [{"text": text} for text in texts(60, number)])
    corpus = JsonlCorpus(name="c", kind="jsonl", path=(tmp_path / "far").as_uri())
    stream = open_stream(corpus, validation=None, window_chunks=1)
    stream.sequence(0)
    asked = fail()
    running: Any = training_batches(
        stream,
        plan=BatchPlan.even(1),
        micro_batch_sequences=1,
        world_size=1,
        rank=0,
        start_step=0,
        num_steps=10**6,
        prepare=attrgetter("positions_B"),
        workers=workers,
    )
    next(running)
    assert asked.wait(WAIT_SECONDS)
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    closing.join(WAIT_SECONDS)
    assert not closing.is_alive() and not stream.cancel.is_set()
