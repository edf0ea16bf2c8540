"""Ranks do not outlive what launched them, and do not wait for a meeting that nobody holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from faulty_runs import wait
from lmssl.errors import TrainingError
from lmssl.train import launcher
from lmssl.train.launcher import Launcher, require_meeting, same_on_all_ranks

RANK = """
import os, sys, time
from lmssl.train.launcher import Launcher
with Launcher() as launcher:
    if sys.argv[2] == "running":
        launcher.then(lambda: (open(sys.argv[1] + ".asked", "w").close(), os._exit(0)))
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(1000)
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)"


@pytest.mark.parametrize("when", ["starting", "running"])
def test_a_rank_ends_with_its_launcher(tmp_path: Path, when: str) -> None:
    mark, errors = tmp_path / "mark", tmp_path / "errors"
    with errors.open("wb") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "-c", RANK, str(mark), when],
            env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
            stderr=file,
        )
    wait(lambda: mark.exists() and mark.read_text() != "")
    rank = psutil.Process(int(mark.read_text()))
    launcher.kill()
    launcher.wait()
    wait(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, seconds=30)
    assert (tmp_path / "mark.asked").exists() == (when == "running")
    assert ("the launcher is gone" in errors.read_text()) == (when == "starting")


def test_a_process_of_its_own_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Launcher()._process is None


def test_a_meeting_that_nobody_holds_is_refused() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        environment = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(held.getsockname()[1]),
        }
        require_meeting(environment, patience_seconds=5.0)
    began = time.monotonic()
    with pytest.raises(TrainingError, match="the launcher's store does not answer") as caught:
        require_meeting(environment, patience_seconds=1.0)
    assert environment["MASTER_PORT"] in str(caught.value)
    assert time.monotonic() - began >= 1.0
    require_meeting({**environment, "TORCHELASTIC_USE_AGENT_STORE": "False"})  # rank 0 will open it


def test_rank_0_decides_once_for_all() -> None:
    """Before there is a group; the others wait for it and never decide, and a second question has the same answer."""
    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(held.port),
    }
    decided: list[str] = []

    def decide() -> str:
        decided.append(threading.current_thread().name)
        return f"step {len(decided)}"

    with ThreadPoolExecutor(1, thread_name_prefix="rank 1") as other:
        waits = other.submit(same_on_all_ranks, "step", decide, shared | {"RANK": "1"})
        time.sleep(0.2)
        assert not waits.done()
        assert [same_on_all_ranks("step", decide, shared | {"RANK": "0"}) for _ in range(2)] == ["step 1", "step 1"]
        assert waits.result(60) == "step 1"
    assert decided == ["MainThread"]
    again = shared | {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert same_on_all_ranks("step", decide, again) == "step 2"


def test_a_process_alone_or_without_a_store_decides_for_itself() -> None:
    alone = {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "1", "RANK": "0"}
    assert same_on_all_ranks("step", lambda: "7", alone) == "7"
    assert same_on_all_ranks("step", lambda: "7", {"WORLD_SIZE": "2", "RANK": "1"}) == "7"


def test_a_rank_0_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_DECISION", timedelta(seconds=1))
    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(held.port),
    }
    with pytest.raises(TrainingError, match="rank 0 does not say which step it takes"):
        same_on_all_ranks("step", lambda: "7", environment)
