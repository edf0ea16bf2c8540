"""What holds for every test: no network, nothing of the user's home, an order that fails fast."""

from __future__ import annotations

import os

# Before any import of a Hugging Face library, because they read these once. Setting them for good, rather than with
# monkeypatch, lets child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are too small to share, and machines that test are busy
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked loader workers would otherwise print a warning each

import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start background jobs so, and processes under test would inherit it: they could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
# House rules answer in seconds and explain most failures below them; unit tests follow; whole runs come last. Files are
# given out to workers in this order, so the longest ones (environments that are installed) stand before many shorter.
ORDER = ("house", "", "recipes", "golden", "packaging", "faults", "numerics")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.path))
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="no CUDA device")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a run of the whole suite that is cut off never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext[-3000:]}", flush=True)


def _rank(path: Path) -> int:
    parts = path.relative_to(TESTS).parts
    return ORDER.index(parts[0]) if len(parts) > 1 and parts[0] in ORDER else ORDER.index("")


@pytest.fixture(autouse=True)
def _no_kernels() -> Iterator[None]:
    """What one test loads is not to be used by the next: stock models stay stock ones."""
    yield
    native = sys.modules.get("lmssl.model.native")
    if native is not None:
        native.set_aside()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections that leave the machine; loopback stays, distributed tests need it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise AssertionError(f"a test tried to reach {address}; tests need no network")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return TESTS.parent


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, a few hundred kilobytes of Python's language reference."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    names = sorted(topics)
    for number in range(4):
        text = "\n\n".join(topics[name] for name in names[number::4])
        (folder / f"part-{number}.txt").write_text(text, encoding="utf-8")
    return folder
