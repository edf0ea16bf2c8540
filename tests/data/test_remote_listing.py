"""What web servers on this machine say of their files."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.remote import RemoteFiles
from lmssl.data.remote_listing import file_system, version_of
from lmssl.errors import DataError

pytest.importorskip("aiohttp")
SILENCE_SECONDS = 0.4


class _Handler(SimpleHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Say nothing for a folder when it is the turn, for longer than the client waits."""
        if self.path.endswith("/") and self.server.failing and self.server.failing.pop(0):
            time.sleep(3 * SILENCE_SECONDS)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


class _Server(ThreadingHTTPServer):
    failing: list[bool]
    """Of the next requests for a folder, which are not answered."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that waits no longer hangs up."""


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """The folder that is served."""
    (tmp_path / "web").mkdir()
    return tmp_path / "web"


@pytest.fixture
def server(web: Path) -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), partial(_Handler, directory=str(web)))
    server.failing = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def url(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def files(tmp_path: Path) -> RemoteFiles:
    return RemoteFiles(
        tmp_path / "remote", 10**6, give_up_seconds=20, first_wait_seconds=0.01, silence_seconds=SILENCE_SECONDS
    )


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def everything(name: str) -> bool:
    return True


def test_a_file_of_the_same_size_and_another_date(web: Path, url: str, files: RemoteFiles) -> None:
    (web / "a.txt").write_bytes(b"before")
    os.utime(web / "a.txt", (10**9, 10**9))
    (path,) = files.list_files(f"{url}/a.txt", everything)
    (web / "a.txt").write_bytes(b"after!")
    with pytest.raises(DataError, match="changed after the corpus was listed"), files.open(path) as file:
        file.read()
    (again,) = files.list_files(f"{url}/a.txt", everything)
    assert again.version != path.version
    with files.open(again) as file:
        assert file.read() == b"after!"


def test_a_tag_says_more_than_a_date() -> None:
    info = {"size": 3, "Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT"}
    assert version_of(info) == "3.Thu, 01 Jan 1970 00:00:00 GMT"
    assert version_of(info | {"ETag": '"abc"'}) == "3.abc"


@pytest.mark.parametrize("failing", [[], [True], [False, True]])
def test_a_pattern_on_a_web_server(
    web: Path, url: str, server: _Server, files: RemoteFiles, failing: list[bool]
) -> None:
    (web / "deep").mkdir()
    for name in ("a.txt", "bb.txt", "c.jsonl", "deep/d.txt"):
        (web / name).write_bytes(name.encode())
    server.failing = list(failing)
    found = files.list_files(f"{url}/*.txt", everything)
    assert [(path, path.num_bytes) for path in found] == [(f"{url}/a.txt", 5), (f"{url}/bb.txt", 6)]
    assert not server.failing and all(path.version == files.list_files(path, everything)[0].version for path in found)
    with files.open(found[1]) as file:
        assert file.read() == b"bb.txt"


def test_a_question_mark_begins_a_query(web: Path, url: str, files: RemoteFiles) -> None:
    (web / "a.txt").write_bytes(b"text")
    (path,) = files.list_files(f"{url}/a.txt?signature=*", everything)
    assert (path, path.num_bytes) == (f"{url}/a.txt?signature=*", 4)


@pytest.mark.parametrize(
    ("name", "reason"), [("*.zip", "the pattern matches nothing"), ("**/*.txt", "only the name of a file may be")]
)
def test_a_pattern_without_files(web: Path, url: str, files: RemoteFiles, name: str, reason: str) -> None:
    (web / "a.txt").write_bytes(b"text")
    with pytest.raises(DataError, match=reason) as caught:
        files.list_files(f"{url}/{name}", everything)
    assert caught.value.where == f"{url}/{name}"


@pytest.mark.parametrize(("scheme", "name"), [("http", "a.txt"), ("https", "*.txt")])
def test_a_server_that_says_nothing_is_asked_again(tmp_path: Path, silent_port: int, scheme: str, name: str) -> None:
    files = RemoteFiles(tmp_path, 10**6, give_up_seconds=2, first_wait_seconds=0.01, silence_seconds=0.1)
    with pytest.raises(DataError, match=r"gave up after ([2-9]|\d\d) attempts in 2 seconds: \w+: .*[Tt]imeout"):
        files.list_files(f"{scheme}://127.0.0.1:{silent_port}/{name}", everything)


def test_silence_ends_a_request_and_length_does_not(tmp_path: Path) -> None:
    files = RemoteFiles(tmp_path, 1)
    limit = file_system("https://127.0.0.1/a.txt", files.silence_seconds).client_kwargs["timeout"]
    assert limit.total is None and 4 * limit.sock_read <= files.give_up_seconds
    assert limit.sock_connect == limit.sock_read == 30
