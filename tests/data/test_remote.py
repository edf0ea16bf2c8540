import copy
import gzip
import json
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lmssl.data import remote as module
from lmssl.data.parquet_files import list_row_groups, read_rows, row_starts
from lmssl.data.records import Format, Record
from lmssl.data.remote import RemoteFiles, RemotePath, check_scheme
from lmssl.data.remote_errors import is_passing
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus, ParquetCorpus, TextCorpus

# The S3 client asks botocore, which tells the date in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RAW = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


class Proxy(ThreadingHTTPServer):
    """Hands requests to a server, and does to them what `faults` says: a status, or a number of body bytes to keep."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.faults: list[tuple[str, int]] = []
        self.log: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections are dropped on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_data = self.command == "GET" and "Range" in self.headers
        self.server.log.append((self.command, self.path, self.headers.get("Range")))
        fault = self.server.faults.pop(0) if self.server.faults and is_data else ("", 0)
        if fault[0] == "status":
            code = "AccessDenied" if fault[1] == 403 else "InternalError"
            self._answer(fault[1], {}, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
            return
        upstream = HTTPConnection("127.0.0.1", self.server.port)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        headers, raw = dict(answer.getheaders()), answer.read()
        upstream.close()
        keep = fault[1] if fault[0] == "cut" else None
        self._answer(answer.status, headers, raw, keep)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _answer(self, status: int, headers: dict[str, str], raw: bytes, keep: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(raw))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(raw if keep is None else raw[:keep])
        self.wfile.flush()
        if keep is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    import s3fs

    proxy = Proxy(s3_port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    values = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    # One attempt of the client's own, so that what is tested is ours.
    values |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": str(tmp_path / "none")}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()
    thread.join()


@pytest.fixture
def put(proxy: Proxy) -> Callable[[str, bytes], str]:
    """`put("bucket/name", content)`: an object, as its URL."""
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{proxy.port}", region_name="us-east-1")

    def build(name: str, content: bytes) -> str:
        bucket, _, key = name.partition("/")
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=content)
        return f"s3://{name}"

    return build


@pytest.fixture
def files(tmp_path: Path) -> RemoteFiles:
    return RemoteFiles(tmp_path / "remote", 1_000_000, give_up_seconds=3, first_wait_seconds=0.01, block_bytes=100_000)


def one(files: RemoteFiles, url: str) -> RemotePath:
    (path,) = files.list_files(url, lambda name: True)
    return path


def read(path: RemotePath) -> bytes:
    with path.files.open(path) as file:
        return file.read()


def ranges(proxy: Proxy) -> list[str]:
    return [asked for method, _, asked in proxy.log if method == "GET" and asked is not None]


def test_files_are_listed_with_their_sizes(put: Any, files: RemoteFiles) -> None:
    for name in ("a.txt", "deep/b.txt", "c.jsonl", "d.txt.gz"):
        put(f"listing/x/{name}", name.encode())
    found = files.list_files("s3://listing/x/*.txt", lambda name: True)
    assert [(path, path.num_bytes) for path in found] == [("s3://listing/x/a.txt", 5)]
    found = files.list_files("s3://listing/x", lambda name: name.endswith((".txt", ".gz")))
    assert found == [f"s3://listing/x/{name}" for name in ("a.txt", "d.txt.gz", "deep/b.txt")]
    assert len(files.list_files("s3://listing/x/**/*.txt", lambda name: True)) >= 1


def test_a_path_travels(put: Any, files: RemoteFiles) -> None:
    path = one(files, put("travel/a", RAW))
    for again in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert again == path == "s3://travel/a" and (again.files, again.version) == (files, path.version)
    assert json.dumps([path]) == '["s3://travel/a"]'


def test_a_file_is_downloaded_once(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("once/a.txt", RAW))
    assert read(path) == RAW
    assert ranges(proxy) == ["bytes=0-99999", "bytes=100000-199999", "bytes=200000-299999"]
    assert read(path) == RAW and len(ranges(proxy)) == 3
    kept = [found for found in files.folder.iterdir() if not found.name.startswith(".lock")]
    assert [found.name.endswith("-a.txt") for found in kept] == [True] * 3


def test_a_part_of_a_file_takes_the_blocks_it_lies_in(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("parts/a", RAW))
    with files.open(path) as file:
        file.seek(250_000)
        assert file.read(20) == RAW[250_000:250_020]
        assert ranges(proxy) == ["bytes=200000-299999"]
        file.seek(90_000)
        assert file.read(20_000) == RAW[90_000:110_000]
    assert ranges(proxy)[1:] == ["bytes=0-99999", "bytes=100000-199999"]


def test_a_download_that_was_cut_short_is_made_again(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("short/a", RAW))
    assert read(path) == RAW
    with files._place(path, 1).open("r+b") as file:
        file.truncate(40_000)
    assert read(path) == RAW and ranges(proxy)[3:] == ["bytes=100000-199999"]


def test_failures_of_the_server_are_outlived(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("errors/a", RAW))
    proxy.faults = [("status", 500), ("status", 503), ("status", 500)]
    assert read(path) == RAW
    assert ranges(proxy)[:4] == ["bytes=0-99999"] * 4 and not proxy.faults


def test_a_dropped_connection_goes_on_where_it_stopped(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("drops/a", RAW))
    proxy.faults = [("", 0), ("cut", 40_000), ("cut", 0)]
    assert read(path) == RAW
    assert not proxy.faults and ranges(proxy).count("bytes=0-99999") == 1
    assert ranges(proxy).count("bytes=100000-199999") == 3


def test_giving_up_names_attempts_and_reason_and_keeps_what_came(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    url = put("dead/a", RAW)
    hasty = RemoteFiles(files.folder, files.max_bytes, 0.3, 0.01, files.block_bytes)
    proxy.faults = [("", 0)] + [("status", 500)] * 1000
    with pytest.raises(DataError, match=r"gave up after \d+ attempts in 0.3 seconds: .+") as caught:
        read(one(hasty, url))
    assert caught.value.where == url and "goes on where the download stopped" in str(caught.value)
    proxy.faults, before = [], len(ranges(proxy))
    assert read(one(files, url)) == RAW
    assert ranges(proxy)[before:] == ["bytes=100000-199999", "bytes=200000-299999"]


def test_a_file_that_changed_after_it_was_listed(put: Any, files: RemoteFiles) -> None:
    path = one(files, put("changing/a", RAW))
    put("changing/a", RAW[::-1])
    with pytest.raises(DataError, match="changed after the corpus was listed") as caught:
        read(path)
    assert caught.value.where == "s3://changing/a"
    again = one(files, "s3://changing/a")
    assert again.version != path.version and read(again) == RAW[::-1]


def test_listing_parquet_files_fetches_their_ends_alone(
    put: Any, files: RemoteFiles, proxy: Proxy, tmp_path: Path
) -> None:
    numbers = np.random.default_rng(1).integers(0, 10**9, (2000, 20))
    table = pa.table({"text": [" ".join(map(str, row)) for row in numbers]})
    urls = []
    for name in "ab":
        parquet.write_table(table, tmp_path / name, row_group_size=500)
        urls.append(put(f"footers/{name}.parquet", (tmp_path / name).read_bytes()))
    size = (tmp_path / "a").stat().st_size
    assert size > 200_000
    path, other = (one(files, url) for url in urls)
    groups = list_row_groups(path, "text")
    assert [(part.start, part.stop) for part, _ in groups] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert row_starts(path) == row_starts(str(tmp_path / "a")) == [0, 500, 1000, 1500]
    list_row_groups(other, "text")
    firsts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges(proxy)]
    assert firsts and min(firsts) >= size - 70_000 and not files.folder.exists()
    before = len(ranges(proxy))
    records = list(read_rows(Format("parquet", field="text"), groups[3][0]))
    assert [record.text for record in records if isinstance(record, Record)] == table["text"].to_pylist()[1500:]
    firsts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges(proxy)[before:]]
    assert firsts and min(firsts) >= size * 3 // 4 - 100_000, "a row group is downloaded, not the file"
    before = len(ranges(proxy))
    assert list_row_groups(path, "text") == groups and len(ranges(proxy)) == before, "it is downloaded now"


def test_the_block_read_longest_ago_makes_room_and_open_ones_stay(put: Any, files: RemoteFiles) -> None:
    files = replace(files, block_bytes=300_000)
    paths = [one(files, put(f"many/{name}", name.encode() * 300_000)) for name in "abcd"]
    for number, path in enumerate(paths[:3]):
        read(path)
        os.utime(files._place(path, 0), ns=(number, number))
    with files.open(paths[0]) as held:  # the one used longest ago, in use again
        assert held.read(1) == b"a"
        os.utime(files._place(paths[0], 0), ns=(0, 0))
        read(paths[3])
        assert [files._place(path, 0).exists() for path in paths] == [True, False, True, True]
        assert held.read() == b"a" * 299_999
    total = sum(path.stat().st_size for path in files.folder.iterdir())
    assert total <= files.max_bytes


def test_a_file_larger_than_the_folder(put: Any, files: RemoteFiles) -> None:
    small = replace(files, max_bytes=200_000)
    assert read(one(small, put("large/a", RAW))) == RAW
    assert sum(path.stat().st_size for path in files.folder.iterdir()) == 200_000
    smaller = replace(files, max_bytes=50_000)
    with pytest.raises(DataError, match="does not fit: 50,000 bytes too many") as caught:
        read(one(smaller, put("larger/a", RAW)))
    assert "data.remote_cache_bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "passing"),
    [
        ({}, True),
        ({"status": 500}, True),
        ({"status": 429}, True),
        ({"status": 410}, False),
        ({"code": 401}, False),
        ({"response": SimpleNamespace(status_code=403)}, False),
        ({"response": SimpleNamespace(status_code=502)}, True),
    ],
)
def test_what_is_tried_again(fields: dict[str, Any], passing: bool) -> None:
    error = OSError("of some library")
    for name, value in fields.items():
        setattr(error, name, value)
    assert is_passing(error) is passing


def test_a_full_disk_is_not_the_servers_fault(put: Any, files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    path = one(files, put("full/a", RAW))
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match="the download cannot be written: No space left on device") as caught:
        read(path)
    assert caught.value.where == str(files.folder)


@pytest.mark.parametrize("url", ["s3://no-such-bucket/a.txt", "s3://present/b.txt", "s3://present/*.zip"])
def test_nothing_there(put: Any, files: RemoteFiles, url: str) -> None:
    put("present/a.txt", b"x")
    with pytest.raises(DataError, match="no such file or bucket") as caught:
        files.list_files(url, lambda name: True)
    assert caught.value.where == url


def test_denied_access_is_not_tried_again(put: Any, files: RemoteFiles, proxy: Proxy) -> None:
    path = one(files, put("closed/a", RAW))
    proxy.faults = [("status", 403)] * 5
    with pytest.raises(DataError, match="access is denied"):
        read(path)
    assert len(proxy.faults) == 4


@pytest.mark.parametrize(
    ("url", "reason", "remedy"),
    [
        ("ftp://host/a.txt", "files behind ftp:// are not read", "s3://"),
        ("https://host/a.txt", "does not allow downloads over https", "allow_https: true"),
    ],
)
def test_schemes_that_are_not_read(url: str, reason: str, remedy: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        check_scheme(url, allow_https=False)
    assert remedy in str(caught.value.remedy)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PACKAGES, "gs", "no_such_package_at_all")
    with pytest.raises(DataError, match="takes the package no_such_package_at_all") as caught:
        check_scheme("gs://bucket/a.txt", allow_https=False)
    assert caught.value.remedy == "pip install no_such_package_at_all"


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet"])
def test_a_remote_corpus_is_the_local_one(
    put: Any, proxy: Proxy, tmp_path: Path, open_stream: Any, texts: Any, kind: str
) -> None:
    path = tmp_path / f"corpus.{kind}"
    if kind == "text":
        path.write_text("\n".join(texts(300)))
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": texts(300)}), path, row_group_size=50)
    else:
        raw = "".join(json.dumps({"text": text}) + "\n" for text in texts(300)).encode()
        path.write_bytes(gzip.compress(raw, mtime=0) if kind.endswith("gz") else raw)
    url = put(f"corpora/corpus.{kind}", path.read_bytes())

    def corpus(where: str) -> Any:
        if kind == "parquet":
            return ParquetCorpus(name="c", kind="parquet", path=where)
        if kind == "text":
            return TextCorpus(name="c", kind="text", path=where, document="line")
        return JsonlCorpus(name="c", kind="jsonl", path=where)

    local, far = open_stream(corpus(str(path))), open_stream(corpus(url), cache="far")
    assert far.num_sequences_per_epoch() == local.num_sequences_per_epoch()
    for position in range(50):
        assert np.array_equal(far.sequence(position).ids_T, local.sequence(position).ids_T)
    downloads = [found for found in (tmp_path / "far" / "remote").iterdir() if not found.name.startswith(".")]
    assert len(downloads) == 1
    sources = {source for unit in far.units("c") for source in (part.path for part in unit.parts)}
    assert sources == {url}


def test_a_remote_file_that_changed_since_the_run_began(put: Any, open_stream: Any, texts: Any) -> None:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts(99)).encode()
    corpus = JsonlCorpus(name="c", kind="jsonl", path=put("begun/a.jsonl", raw))
    ledger = open_stream(corpus).ledger  # of which nothing is read yet
    assert open_stream(corpus, ledger=ledger).sequence(0)
    put("begun/a.jsonl", raw.replace(b"river", b"rover"))
    with pytest.raises(DataError, match="the text of corpus 'c' changed since the run began") as caught:
        open_stream(corpus, ledger=ledger, cache="other")
    assert caught.value.where == "s3://begun/a.jsonl"
