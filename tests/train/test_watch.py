"""Heartbeats and failures as files, and who is found to hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faulty_runs import wait
from lmssl.train.phases import COMPUTE, DATA, SAVE, Phases
from lmssl.train.watch import Watch, clear


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch_of(folder: Path, rank: int, *, entered: int, num_ranks: int = 2, clock: Clock | None = None) -> Watch:
    phases = Phases(clock=clock or Clock())
    for _ in range(entered):
        phases.enter(COMPUTE, "forward of micro-batch 0")
    found = Watch(folder, phases, rank=rank, num_ranks=num_ranks, hang_seconds=10.0)
    found.prepare()
    return found


def test_a_failure_is_told_once_and_by_the_first(tmp_path: Path) -> None:
    clear(tmp_path / "beats", 2)
    one, two = (watch_of(tmp_path / "beats", rank, entered=1) for rank in range(2))
    assert two.failure_elsewhere(patience_seconds=0.0) is None
    one.fail("the disk is on fire")
    one.fail("and so is the house")
    two.fail("the gradient did not come")
    assert two.failure_elsewhere() == ("rank 0 failed in forward of micro-batch 0 in step 1: the disk is on fire")
    assert one.failure_elsewhere(patience_seconds=0.0) is None
    clear(tmp_path / "beats", 1)
    assert [path.name for path in (tmp_path / "beats").iterdir()] == ["rank-00000.json"]


def test_the_rank_that_is_least_far_hangs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clear(tmp_path, 3)
    clock = Clock()
    ranks = [watch_of(tmp_path, rank, entered=(7, 5, 7)[rank], num_ranks=3, clock=clock) for rank in range(3)]
    assert ranks[0]._hang() is None
    clock.now = 11.0
    for rank in ranks:
        rank._beat(str(rank._phases))
    expected = "rank 1 hangs in forward of micro-batch 0 in step 1; nothing has moved for 11 s"
    assert ranks[0]._hang() == expected
    assert ranks[1]._hang() == expected
    assert ranks[1].failure_elsewhere() == expected  # and it may hear so before it finds out by itself
    assert ranks[2].failure_elsewhere() == expected
    ranks[0]._show_where(expected)
    assert "most recent call first" not in capfd.readouterr().err
    ranks[1]._show_where(expected)
    assert "most recent call first" in capfd.readouterr().err


def test_a_process_that_was_stopped_does_not_hang(tmp_path: Path) -> None:
    clock = Clock()
    rank = watch_of(tmp_path, 0, entered=5, num_ranks=1, clock=clock)
    clock.now = 3000.0
    rank._forgive_sleep(1.0)
    rank._beat(str(rank._phases))
    assert rank._phases.seconds == 3000.0
    rank._forgive_sleep(2999.0)
    rank._beat(str(rank._phases))
    assert rank._hang() is None
    clock.now += 11.0
    rank._beat(str(rank._phases))
    assert rank._hang() is not None


def test_a_rank_that_moves_is_waited_for_while_its_heart_beats(tmp_path: Path) -> None:
    """One that writes files in a save, while the others wait for it; a heartbeat that is old says nothing."""
    clear(tmp_path, 2)
    clock = Clock()
    ranks = [watch_of(tmp_path, rank, entered=5, clock=clock) for rank in range(2)]
    for rank in ranks:
        rank._phases.enter(SAVE)
    clock.now = 8.0
    ranks[1]._phases.saved_file()
    clock.now = 11.0
    for rank in ranks:
        rank._beat(str(rank._phases))
    assert ranks[0]._hang() is None
    path = tmp_path / "rank-00001.json"
    long_ago = path.stat().st_mtime - 60
    os.utime(path, (long_ago, long_ago))
    assert ranks[0]._hang() == (
        "rank 0 hangs in save in step 1; rank 1 hangs in save in step 1; nothing has moved for 11 s"
    )


def test_a_neighbour_that_died_is_named_and_one_that_ended_is_not(tmp_path: Path) -> None:
    clear(tmp_path, 2)
    neighbour = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    beat = json.loads((watch_of(tmp_path, 0, entered=1).folder / "rank-00000.json").read_text())
    for phase in ("ended", "data in step 1"):
        (tmp_path / "rank-00001.json").write_text(json.dumps(beat | {"rank": 1, "pid": neighbour.pid, "phase": phase}))
        mine = watch_of(tmp_path, 0, entered=1)
        if phase == "ended":
            mine.start()
            neighbour.kill()
            neighbour.wait()
            assert mine.failure_elsewhere(patience_seconds=0.3) is None
        else:
            mine._neighbours = {1: neighbour.pid}
            assert mine.failure_elsewhere() == (
                f"rank 1 is gone: its process {neighbour.pid} on {beat['host']} has died or was killed"
            )
        mine.close()


def test_a_heartbeat_says_where_a_rank_is_and_that_it_ended(tmp_path: Path) -> None:
    clear(tmp_path, 1)
    phases = Phases()
    watch = Watch(tmp_path, phases)
    watch.prepare()
    watch.start()
    phases.step = 4
    phases.enter(DATA)
    path = tmp_path / "rank-00000.json"
    wait(lambda: json.loads(path.read_text())["phase"] == "data in step 5", seconds=60)
    watch.close()
    beat = json.loads(path.read_text())
    assert (beat["rank"], beat["pid"], beat["step"], beat["phase"]) == (0, os.getpid(), 4, "ended")


def test_heartbeats_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "nowhere", Phases())
    watch.prepare()
    watch.fail("whatever")
    watch.close()
    assert not (tmp_path / "nowhere").exists()
