"""Room on the disk is asked for first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmssl.checkpoint import Checkpoint, Keep, check_space, space
from lmssl.errors import CheckpointError

Save = Callable[..., Checkpoint]


def check(run: Path, free: int, monkeypatch: pytest.MonkeyPatch, num_checkpoints: int = 3) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(space, "free_bytes", lambda _: free)
    check_space(run, 1_000_000, num_checkpoints=num_checkpoints, report=said.append)
    return said


def test_a_disk_without_room_for_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match=r"needs 1,000,000 bytes \(1.0 MB\) and the disk has 999,999 free"
    ) as error:
        check(tmp_path, 999_999, monkeypatch)
    assert error.value.remedy == "free at least 1 bytes, or choose another out"


def test_a_disk_without_room_for_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save) -> None:
    assert check(tmp_path, 3_000_000, monkeypatch) == []
    (said,) = check(tmp_path, 2_500_000, monkeypatch)
    assert "has 2.5 MB free, and 3 checkpoints of 1.0 MB will be there at once, 0 are: free 0.5 MB" in said
    save(tmp_path, 1)
    assert check(tmp_path, 2_500_000, monkeypatch) == []


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "not" / "yet") > 0


def test_how_many_a_run_keeps() -> None:
    assert Keep(last=2).most(1000) == 2
    assert Keep(last=2, every_steps=300, best=1).most(1000) == 6
