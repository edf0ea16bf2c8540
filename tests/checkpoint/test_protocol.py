"""Several ranks save one checkpoint, and an error of one is an error of all; ranks are threads here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint, Keep, Saver, protocol
from lmssl.errors import CheckpointError

Save = Callable[..., Checkpoint]

SIZES = {"a": 5, "b": 4, "c": 3, "d": 2, "e": 1}


class Meetings:
    """What ranks in threads meet by; one that leaves is gone for all."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._texts = [""] * num_ranks
        self.counts = [0] * num_ranks

    def of(self, rank: int) -> Any:
        meetings = self

        class _Meeting:
            def exchange(self, text: str) -> list[str]:
                meetings.counts[rank] += 1
                meetings._texts[rank] = text
                try:
                    meetings._barrier.wait()
                    found = list(meetings._texts)
                    meetings._barrier.wait()
                except threading.BrokenBarrierError as error:
                    raise ConnectionError("Connection closed by peer") from error
                return found

        return _Meeting()

    def leave(self) -> None:
        self._barrier.abort()


def part(rank: int, num_ranks: int, value: float) -> dict[str, dict[str, torch.Tensor]]:
    """What a rank owns of five tensors and their states."""
    owners = checkpoint.owners(SIZES, num_ranks)
    mine = {name: torch.full((SIZES[name],), float(value)) for name, owner in owners.items() if owner == rank}
    return {"model": mine, "optim": {f"exp_avg/{name}": -tensor for name, tensor in mine.items()}}


def all_ranks(
    run: Path, step: int, num_ranks: int, given: Callable[[int], dict[str, Any]] = lambda _: {}, **options: Any
) -> list[Exception | None]:
    """Every rank saves a step; what each of them raised."""
    meetings = Meetings(num_ranks)
    raised: list[Exception | None] = [None] * num_ranks

    def save(rank: int) -> None:
        mine = {"tensors": part(rank, num_ranks, step), **given(rank)}
        saver = Saver(
            mine.pop("run", run),
            keep=Keep(last=9),
            clock=lambda: 0.0,
            report=lambda _: None,
            rank=rank,
            num_ranks=num_ranks,
            group=meetings.of(rank),
            **options,
        )
        texts = {"state.json": json.dumps({"rank": rank})}
        try:
            saver.save(step, texts=texts, **mine)
            saver.close()
        except Exception as error:
            raised[rank] = error
            if not isinstance(error, CheckpointError):
                meetings.leave()

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert len(set(meetings.counts)) == 1, "ranks met unequally often"
    return raised


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_what_ranks_own_is_one_checkpoint(tmp_path: Path, num_ranks: int, asynchronous: bool) -> None:
    assert all_ranks(tmp_path, 4, num_ranks, asynchronous=asynchronous) == [None] * num_ranks
    found = checkpoint.find_step(tmp_path, None)
    assert found.groups == ("model", "optim")
    assert {name: tensor.shape[0] for name, tensor in found.tensors("model").items()} == SIZES
    assert all(torch.equal(t, torch.full_like(t, 4.0)) for t in found.tensors("model").values())
    assert set(found.tensors("optim")) == {f"exp_avg/{name}" for name in SIZES}
    assert json.loads(found.text("state.json")) == {"rank": 0}
    assert found.manifest["num_ranks"] == num_ranks
    files = {path.name for path in found.path.iterdir()}
    assert files == set(found.manifest["files"]) | {"manifest.json"}
    assert ("model.safetensors" in files) == (num_ranks == 1)
    assert (f"optim-{num_ranks:05d}-of-{num_ranks:05d}.safetensors" in files) == (num_ranks > 1)


def refused(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_rank_is_raised_on_all_and_nothing_is_left(
    tmp_path: Path, save: Save, failing: int, asynchronous: bool
) -> None:
    save(tmp_path, 1)

    def given(rank: int) -> dict[str, Any]:
        named = part(rank, 3, 2.0)
        named["model"]["a" if rank == failing else "b"] = torch.full((2,), float("nan") if rank == failing else 1.0)
        return {"tensors": named}

    raised = all_ranks(tmp_path, 2, 3, given, asynchronous=asynchronous)
    assert [type(error) for error in raised] == [CheckpointError] * 3
    assert len({str(error) for error in raised}) == 1
    assert f"rank {failing}: a holds numbers that are not finite" in str(raised[0])
    assert "the checkpoint of step 1 is intact" in str(raised[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.find_step(tmp_path, None).step == 1


def test_a_copy_that_fails_is_an_error_of_all(tmp_path: Path) -> None:
    def given(rank: int) -> dict[str, Any]:
        return {"tensors": refused(MemoryError("no room for the copy"))} if rank == 1 else {}

    raised = all_ranks(tmp_path, 2, 2, given)
    assert all("rank 1: MemoryError: no room for the copy" in str(error) for error in raised)
    assert not (tmp_path / "checkpoints").exists()


def test_a_rank_that_dies_is_an_error_of_the_others(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    meetings = Meetings(2)

    def die() -> None:
        meetings.of(1).exchange(json.dumps({"value": [0, 10**9], "error": None, "remedy": None}))
        meetings.leave()

    other = threading.Thread(target=die)
    other.start()
    saver = Saver(tmp_path, keep=Keep(1), clock=lambda: 0.0, report=lambda _: None, num_ranks=2, group=meetings.of(0))
    with pytest.raises(CheckpointError, match="a rank is gone: Connection closed by peer"):
        saver.save(2, tensors=part(0, 2, 2.0), texts={})
    other.join(60)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    """A run folder on a disk that each node has for itself."""
    raised = all_ranks(tmp_path, 2, 2, lambda rank: {"run": tmp_path / f"node{rank}"})
    assert all("must write to one shared file system" in str(error) for error in raised)


@pytest.mark.parametrize("broken", ["write_tensors", "write_synced", "sync_folder", "rename", "fingerprint"])
def test_a_failing_disk_leaves_the_earlier_checkpoint_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save, broken: str
) -> None:
    save(tmp_path, 1)
    full = refused(OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(Path if broken == "rename" else protocol, broken, full)
        with pytest.raises(CheckpointError, match="step 2 could not be written: .*No space left") as error:
            save(tmp_path, 2)
    assert "the checkpoint of step 1 is intact" in str(error.value)
    assert [p.name for p in checkpoint.checkpoints_path(tmp_path).iterdir()] == ["step-00000001"]
    assert checkpoint.find_step(tmp_path, None).step == 1


def test_what_is_read_back_otherwise_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    sync = protocol._forget_cached

    def spoiled(path: Path) -> None:
        if path.suffix == ".safetensors":
            content = bytearray(path.read_bytes())
            content[-3] ^= 4
            path.write_bytes(content)
        sync(path)

    monkeypatch.setattr(protocol, "_forget_cached", spoiled)
    with pytest.raises(CheckpointError, match="model.safetensors was read back otherwise than it was written"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_invalid_leftover_of_the_same_step_is_replaced(tmp_path: Path, save: Save) -> None:
    (save(tmp_path, 2).path / "model.safetensors").write_bytes(b"short")
    save(tmp_path, 2)
    assert checkpoint.find_step(tmp_path, 2).step == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_bytes_that_all_ranks_need_are_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 4 * sum(SIZES.values()) + len('{"rank": 0}')
    monkeypatch.setattr(protocol, "free_bytes", lambda _: needed - 1)
    raised = all_ranks(tmp_path, 2, 2)
    assert all(f"needs {needed} bytes" in str(e) and f"has {needed - 1} free" in str(e) for e in raised)
    assert not (tmp_path / "checkpoints").exists()
    monkeypatch.setattr(protocol, "free_bytes", lambda _: needed)
    assert all_ranks(tmp_path, 2, 2) == [None, None]
