"""Two runs on one folder, and locks whose owner is dead."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from faulty_runs import PATIENCE_SECONDS, faulty_run, interrupt, wait
from lmssl.errors import CheckpointError
from lmssl.train.lock import LOCK, OWNER, RunLock
from runs import small_recipe, write_recipe

HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
open(sys.argv[2], "w").close()
time.sleep(1000)
"""


def test_a_lock_refuses_another_and_names_the_owner(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire() is None
    assert first.acquire() is None  # it has it
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on {socket.gethostname()}, since 20"):
        second.acquire()
    first.release()
    assert second.acquire() is None
    second.release()


def test_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    """The system gives it back; what the owner wrote stays."""
    code = "import os, sys; from pathlib import Path; from lmssl.train.lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); lock.acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=PATIENCE_SECONDS)
    assert (tmp_path / OWNER).exists()
    assert RunLock(tmp_path).acquire() is None


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that holds the lock, as one that a killed run left behind."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK), str(tmp_path / "held")])
    wait(lambda: (tmp_path / "held").exists())
    yield process
    process.kill()
    process.wait()


def write_owner(tmp_path: Path, host: str, pid: int) -> None:
    (tmp_path / OWNER).write_text(json.dumps({"host": host, "pid": pid, "started": "2026-01-01 00:00:00 UTC"}))


def test_a_lock_that_a_dead_owner_left_with_another_is_taken_over(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_owner(tmp_path, socket.gethostname(), gone.pid)
    lock = RunLock(tmp_path)
    said = lock.acquire()
    assert said is not None
    assert f"process {gone.pid}, which is dead" in said
    with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_lock_is_not_taken_from_a_living_owner_or_another_host(
    tmp_path: Path, holder: subprocess.Popen[bytes], host: str
) -> None:
    owner = (socket.gethostname(), holder.pid) if host == "here" else ("elsewhere", 4)
    write_owner(tmp_path, *owner)
    with pytest.raises(CheckpointError, match=f"process {owner[1]} on {owner[0]}"):
        RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock has words of its own
        said = RunLock(tmp_path).acquire()
    assert said is not None
    assert "no locks" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_of_two_runs_on_one_folder_is_refused(tmp_path: Path, text_folder: Path) -> None:
    """While the first trains, and, begun at the same moment, when the first has made the folder meanwhile."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=3)
    )
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir()
    late = """
from lmssl.train import opening
build = opening.build_recipe_model
def slow(*args, **kwargs):
    at("building")
    return build(*args, **kwargs)
opening.build_recipe_model = slow
"""
    slow = "on_sums(lambda n, training: at('micro') if training and n == 3 else None)"
    with faulty_run(two, recipe, late) as second:
        second.reached("building")  # it found no folder
        with faulty_run(one, recipe, slow) as first:
            pid = first.reached("micro")
            second.go("building")
            assert second.end() == 6, second.output
            assert f"process {pid} on {socket.gethostname()}" in second.output
            with faulty_run(three, recipe) as third:
                assert third.end() == 6, third.output
                assert f"process {pid} on" in third.output
            interrupt(pid, signal.SIGKILL)
            first.end()
    with faulty_run(three, recipe) as third:
        assert third.end() == 0, third.output
