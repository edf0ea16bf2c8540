"""Saving beside training: what the pause is, that one save follows the other, and that nothing is lost."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.checkpoint import Keep, Saver, protocol
from lmssl.errors import CheckpointError

Tensors = dict[str, dict[str, torch.Tensor]]


def tensors(value: float) -> Tensors:
    return {"model": {"a": torch.full((8,), value)}}


def opened(run: Path, said: list[str] | None = None, **given: Any) -> Saver:
    ticks = itertools.count()
    report = (said if said is not None else []).append
    given = {"keep": Keep(last=9), "asynchronous": True, "clock": lambda: float(next(ticks)), "report": report, **given}
    return Saver(run, **given)


class Gate:
    """Holds writers of tensors until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = protocol.write_tensors

        def held(path: Path, named: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return write(path, named)

        monkeypatch.setattr(protocol, "write_tensors", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, gate: Gate) -> None:
    said: list[str] = []
    saver = opened(tmp_path, said)
    saver.save(3, tensors=tensors(3.0), texts={"state.json": "{}"}, tokens=300)
    assert gate.reached.wait(60)
    assert saver.finished() == [] and said == [] and checkpoint.step_folders(tmp_path) == []
    gate.open.set()
    saver.wait()
    (saved,) = saver.finished()
    assert (saved.step, saved.num_bytes) == (3, 34)
    # The clock ticks once a reading: begin, pause, end.
    assert 0 < saved.pause_seconds <= 2 and saved.total_seconds >= 1
    assert len(said) == 1 and said[0].startswith("checkpoint of step 3: 34 bytes, training paused")
    assert saver.finished() == []
    assert checkpoint.find_step(tmp_path, 3).manifest["tokens"] == 300


def test_a_second_save_waits_for_the_first_and_copies_after_it(tmp_path: Path, gate: Gate) -> None:
    saver = opened(tmp_path)
    saver.save(1, tensors=tensors(1.0), texts={})
    assert gate.reached.wait(60)
    there: list[list[int]] = []

    def copied() -> Tensors:
        there.append([int(p.name.removeprefix("step-")) for p in checkpoint.step_folders(tmp_path)])
        return tensors(2.0)

    second = threading.Thread(target=lambda: saver.save(2, tensors=copied, texts={}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and there == []
    gate.open.set()
    second.join(60)
    assert there == [[1]]
    saver.close()
    assert [saved.step for saved in saver.finished()] == [1, 2]
    assert torch.equal(checkpoint.find_step(tmp_path, None).tensors("model")["a"], torch.full((8,), 2.0))


def test_the_pause_of_a_synchronous_save_is_all_of_it(tmp_path: Path) -> None:
    saver = opened(tmp_path, asynchronous=False)
    pause = saver.save(1, tensors=tensors(1.0), texts={})
    (saved,) = saver.finished()
    assert pause == saved.pause_seconds == saved.total_seconds > 0
    assert checkpoint.find_step(tmp_path, 1).step == 1


def test_a_save_says_that_it_goes_on_at_each_file(tmp_path: Path) -> None:
    """Three that are written; those and the state are read back."""
    saver, moved = opened(tmp_path), []
    saver.progress = lambda: moved.append(1)
    named = tensors(1.0)["model"]
    groups = {"model": named, "optim": named, "ema": named}
    saver.save(1, tensors=groups, texts={"state.json": "{}"})
    saver.close()
    assert len(moved) == 3 + 4


def test_a_step_that_is_being_saved_or_was_is_not_saved_again(tmp_path: Path, gate: Gate) -> None:
    """As when a signal comes during the save of the step at which training stops."""
    saver = opened(tmp_path)
    saver.save(1, tensors=tensors(1.0), texts={})
    assert saver.save(1, tensors=tensors(7.0), texts={}) == 0.0
    gate.open.set()
    saver.wait()
    assert saver.save(1, tensors=tensors(8.0), texts={}) == 0.0
    saver.close()
    assert len(saver.finished()) == 1
    assert torch.equal(checkpoint.find_step(tmp_path, 1).tensors("model")["a"], torch.full((8,), 1.0))


@pytest.mark.parametrize("asked_by", ["wait", "save", "close"])
def test_a_failed_save_is_raised_once_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_by: str
) -> None:
    saver = opened(tmp_path)
    saver.save(1, tensors=tensors(1.0), texts={})
    saver.wait()

    def full(path: Path, named: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(protocol, "write_tensors", full)
    saver.save(2, tensors=tensors(2.0), texts={})
    assert saver._writing is not None
    saver._writing.exception(60)
    monkeypatch.undo()
    ask: dict[str, Callable[[], Any]] = {
        "wait": saver.wait,
        "save": lambda: saver.save(3, tensors=tensors(3.0), texts={}),
        "close": saver.close,
    }
    with pytest.raises(
        CheckpointError, match="the checkpoint of step 2 could not be written: .*No space left"
    ) as error:
        ask[asked_by]()
    assert "the checkpoint of step 1 is intact" in str(error.value) and "are free" in str(error.value)
    assert not saver.failed
    assert [path.name for path in checkpoint.checkpoints_path(tmp_path).iterdir()] == ["step-00000001"]
    if asked_by != "close":
        saver.save(2, tensors=tensors(2.0), texts={})
        saver.close()
        assert checkpoint.find_step(tmp_path, None).step == 2


def test_failed_is_seen_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = opened(tmp_path)
    saver.save(1, tensors=tensors(float("nan")), texts={})
    assert saver._writing is not None
    saver._writing.exception(60)
    assert saver.failed and saver.finished() == [] and saver.failed
    with pytest.raises(CheckpointError, match="a holds numbers that are not finite") as error:
        saver.wait()
    assert "lower optim.lr" in str(error.value) and "no earlier checkpoint" in str(error.value)
    assert list(checkpoint.checkpoints_path(tmp_path).iterdir()) == []


def test_going_back_forgets_what_was_saved(tmp_path: Path) -> None:
    saver = opened(tmp_path)
    for step in (1, 2, 3):
        saver.save(step, tensors=tensors(float(step)), texts={})
    saver.go_back(1)
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000001"]
    saver.save(3, tensors=tensors(9.0), texts={})
    saver.close()
    assert torch.equal(checkpoint.find_step(tmp_path, 3).tensors("model")["a"], torch.full((8,), 9.0))


def test_leftovers_of_killed_saves_are_swept_at_the_start_and_at_a_save(tmp_path: Path) -> None:
    parent = checkpoint.checkpoints_path(tmp_path)
    (parent / ".tmp-step-00000007").mkdir(parents=True)
    saver = opened(tmp_path)
    assert list(parent.iterdir()) == []
    (parent / ".tmp-removed-step-00000001").mkdir()
    saver.save(8, tensors=tensors(1.0), texts={})
    saver.close()
    assert [path.name for path in parent.iterdir()] == ["step-00000008"]


def test_other_ranks_sweep_nothing(tmp_path: Path) -> None:
    (checkpoint.checkpoints_path(tmp_path) / ".tmp-step-00000007").mkdir(parents=True)
    opened(tmp_path, rank=1, num_ranks=2)
    assert len(list(checkpoint.checkpoints_path(tmp_path).iterdir())) == 1


def test_the_manifest_says_what_was_saved_and_by_what(tmp_path: Path) -> None:
    saver = opened(tmp_path, about={"backend": "single", "versions": {"torch": "2"}})
    saver.save(4, tensors=tensors(1.0), texts={"state.json": "{}"}, tokens=64, finite=False, validation_loss=2.5)
    saver.close()
    manifest = json.loads((checkpoint.find_step(tmp_path, 4).path / "manifest.json").read_text())
    files = manifest.pop("files")
    assert set(files) == {"model.safetensors", "state.json"}
    assert all(set(file) == {"size", "sha256", "xxh128"} for file in files.values())
    assert manifest == {
        "format": 3,
        "step": 4,
        "tokens": 64,
        "finite": False,
        "validation_loss": 2.5,
        "backend": "single",
        "versions": {"torch": "2"},
        "num_ranks": 1,
    }


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    saver = opened(tmp_path)
    saver.save(4, tensors=tensors(1.0), texts={}, validation_loss=float("nan"))
    saver.close()
    assert checkpoint.find_step(tmp_path, 4).manifest["validation_loss"] is None


LEAVING = """
import sys, time
from pathlib import Path
import torch
from lmssl.checkpoint import Keep, Saver, protocol
write = protocol.write_tensors
def slow(path, named):
    time.sleep(1.0)
    return write(path, named)
protocol.write_tensors = slow
saver = Saver(Path(sys.argv[1]), keep=Keep(last=9), asynchronous=True, clock=time.monotonic, report=print)
saver.save(5, tensors={"model": {"a": torch.ones(3)}}, texts={})
if sys.argv[2] == "error":
    raise RuntimeError("training failed")
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["exit", "error"])
def test_the_interpreter_does_not_leave_before_a_save_is_done(tmp_path: Path, how: str) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING, str(tmp_path), how], capture_output=True, timeout=200)
    assert done.returncode == {"exit": 3, "error": 1}[how], done.stderr.decode()
    assert checkpoint.find_step(tmp_path, None).step == 5
