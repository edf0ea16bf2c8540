"""Files of web servers on this machine: one whose certificate is its own, and one that fails for a while."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.remote import RemoteFiles
from lmssl.errors import DataError
from runs import write_lines

READ = """
import json, sys
from pathlib import Path
from lmssl.data.corpus import list_units, read_chunks
from lmssl.data.remote import RemoteFiles
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus

files = RemoteFiles(Path(sys.argv[2]), 10**6, give_up_seconds=float(sys.argv[3]), first_wait_seconds=0.05)
corpus = JsonlCorpus(name="c", kind="jsonl", path=sys.argv[1], allow_https=True)
try:
    (unit,) = list_units(corpus, remote=files)
    print(json.dumps([document.text for chunk in read_chunks(unit, max_bad_records=0) for document in chunk.documents]))
except DataError as error:
    print(json.dumps([error.what, str(error.where)]))
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not trust it hangs up."""


def certificate(folder: Path) -> Path:
    """For 127.0.0.1, with its key, in one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    day = datetime.timedelta(days=1)
    build = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    made = build.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    (folder / "trusted.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "server.pem"


class _Busy(_Quiet):
    """Answers 503 so many times."""

    left = 0

    def do_HEAD(self) -> None:
        """Also `do_GET`."""
        if _Busy.left:
            _Busy.left -= 1
            self.send_error(503)
        elif self.command == "HEAD":
            super().do_HEAD()
        else:
            super().do_GET()

    do_GET = do_HEAD


@pytest.mark.parametrize(("failures", "reason"), [(5, None), (10**6, "gave up after .* 503")])
def test_a_server_that_fails_while_files_are_listed(tmp_path: Path, failures: int, reason: str | None) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a.txt").write_bytes(b"text")
    server = _Server(("127.0.0.1", 0), partial(_Busy, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url, _Busy.left = f"http://127.0.0.1:{server.server_address[1]}/a.txt", failures
    files = RemoteFiles(tmp_path / "remote", 10**6, give_up_seconds=0.5 if reason else 20, first_wait_seconds=0.01)
    try:
        if reason is None:
            (path,) = files.list_files(url, lambda name: True)
            assert (path.num_bytes, _Busy.left) == (4, 0)
        else:
            with pytest.raises(DataError, match=reason):
                files.list_files(url, lambda name: True)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_web_server_that_does_not_know_ranges(tmp_path: Path) -> None:
    content = b"0123456789" * 30_000
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").write_bytes(content)
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    files = RemoteFiles(tmp_path / "remote", 10**6, give_up_seconds=3, first_wait_seconds=0.01, block_bytes=100_000)
    try:
        (path,) = files.list_files(f"{url}/a.txt", lambda name: True)
        with files.open(path) as file:
            assert file.read() == content
        with pytest.raises(DataError, match="no such file or bucket"):
            files.list_files(f"{url}/b.txt", lambda name: True)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_files_of_a_server_that_is_trusted(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "web").mkdir()
    texts = [f"text {i}" for i in range(50)]
    write_lines(tmp_path / "web" / "a.jsonl", [{"text": text} for text in texts])
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{server.server_address[1]}/a.jsonl"

    def read(trusted: Path | None) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
        environment |= {"SSL_CERT_FILE": str(trusted)} if trusted else {}
        command = [sys.executable, "-c", READ, url, str(tmp_path / "remote"), "20" if trusted else "0.2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
        found: list[str] = json.loads(done.stdout)
        return found

    try:
        assert read(tmp_path / "trusted.pem") == texts
        what, where = read(None)
        assert "certificate" in what.lower() and where == url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
