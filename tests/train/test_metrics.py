"""metrics.jsonl: what stays when a run continues, and what a full disk does to it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmssl.checkpoint.protocol import RankWriter
from lmssl.errors import CheckpointError
from lmssl.recipe.load import load_recipe
from lmssl.train.metrics import MetricsLog
from lmssl.train.run import train
from lmssl.train.state import TrainState
from runs import small_recipe, write_recipe


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(step: int, kind: str = "train", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **more}


def test_what_comes_after_the_state_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    back = [row(4, "guard", action="rollback", rollback=number) for number in (1, 2)]
    lines = [row(0, "evaluate"), row(2), row(4), row(4, "evaluate"), *back, row(6, "guard", action="skip"), row(6)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr'
    for state, kept in (
        (TrainState(step=4, evaluation={"step": 4}), lines[:4]),
        (TrainState(step=4, evaluation={"step": 0}), lines[:3]),  # the evaluation was not finished, and is made again
        (TrainState(step=4, evaluation={"step": 4}, rollbacks=[{}]), lines[:5]),
        (TrainState(step=3, rollbacks=[{}]), lines[:2]),
        (TrainState(), []),
        (TrainState(step=6, evaluation={"step": 4}, rollbacks=[{}, {}]), lines),
    ):
        path.write_text(text, encoding="utf-8")
        MetricsLog(path, state, print).close()
        assert rows_of(path) == kept


def test_a_full_disk_is_said_once_and_lines_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is written before the disk is full; nothing of it stays, and no line is lost once there is room."""
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", TrainState(), said.append)
    log.write(row(1))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            self.file.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            found: int = self.file.fileno()
            return found

        def close(self) -> None:
            self.file.close()

    true = log._file
    monkeypatch.setattr(log, "_file", Full(true))
    log.write(row(2))
    log.write(row(3))
    assert rows_of(log.path) == [row(1)]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    monkeypatch.setattr(log, "_file", true)
    log.write(row(4))
    log.close()
    assert rows_of(log.path) == [row(1), row(2), row(3), row(4)]
    assert len(said) == 1


def test_lines_are_on_the_disk_before_a_checkpoint_is_made(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a machine that stops could leave a checkpoint that knows of steps whose lines are gone."""
    done: list[str] = []
    sync, prepare = MetricsLog.sync, RankWriter.prepare
    fsync = os.fsync

    def synced(self: MetricsLog) -> None:
        monkeypatch.setattr(os, "fsync", lambda number: done.append(Path(f"/proc/self/fd/{number}").readlink().name))
        sync(self)
        monkeypatch.setattr(os, "fsync", fsync)

    def prepared(self: RankWriter, step: int, *arguments: Any) -> Any:
        done.append(f"step {step}")
        return prepare(self, step, *arguments)

    monkeypatch.setattr(MetricsLog, "sync", synced)
    monkeypatch.setattr(RankWriter, "prepare", prepared)
    changes = {"checkpoint.every_steps": 1, "checkpoint.asynchronous": False, "data.validation": None}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2, **changes)
    train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    assert done == ["metrics.jsonl", "step 1", "metrics.jsonl", "step 2"]


def test_a_file_that_cannot_be_begun_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl.tmp").mkdir()
    with pytest.raises(CheckpointError, match="the metrics cannot be written"):
        MetricsLog(tmp_path / "metrics.jsonl", TrainState(), print)


def test_the_state_keeps_every_digit() -> None:
    state = TrainState(step=3, recent=[(2, 0.1 + 0.2, 1e-17)], rollbacks=[{"skip": [1, 2]}], skip=((1, 2),))
    assert TrainState.from_json(state.to_json()) == state
    older = json.loads(state.to_json())
    for name in ("recent", "rollbacks", "spikes", "elapsed_seconds"):
        del older[name]
    assert TrainState.from_json(json.dumps(older)) == TrainState(step=3, skip=((1, 2),))
