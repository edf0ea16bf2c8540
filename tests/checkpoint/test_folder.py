"""Checkpoints are found only when whole, and what is wrong with others is said."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint
from lmssl.checkpoint.folder import remove, sweep
from lmssl.errors import CheckpointError

Save = Callable[..., Checkpoint]


def test_round_trip(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 3)
    found = checkpoint.find_step(tmp_path, None)
    assert found.step == 3
    assert found.groups == ("model",)
    tensors = found.tensors("model")
    assert list(tensors) == ["a", "b"] and len(tensors) == 2
    assert torch.equal(tensors["a"], torch.full((4,), 3.0)) and torch.equal(tensors["b"], torch.tensor(2.5))
    assert json.loads(found.text("state.json")) == {"step": 3}
    assert {p.stat().st_mode & 0o777 for p in found.path.glob("*.safetensors")} == {0o644}
    with pytest.raises(CheckpointError, match="no tensors named ema") as error:
        found.tensors("ema")
    assert error.value.remedy == "there are model"


def test_the_newest_is_found_and_others_by_step(tmp_path: Path, save: Save) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    (checkpoint.checkpoints_path(tmp_path) / "step-of-mine").mkdir()
    assert checkpoint.find_step(tmp_path, None).step == 10
    assert checkpoint.find_step(tmp_path, 2).step == 2
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == [f"step-{n:08d}" for n in (1, 2, 9, 10)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def change(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda p: flip(p / "model.safetensors"), "model.safetensors does not match its checksum"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 40), "model.safetensors has 40 bytes instead of"),
    "missing file": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "its manifest is unreadable"),
    "manifest of another shape": (lambda p: (p / "manifest.json").write_text("[1]"), "its manifest is unreadable"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "its manifest is unreadable"),
    "newer format": (lambda p: change(p, format=99), "its format is 99, this version reads 1 and 2"),
    "another step": (lambda p: change(p, step=7), "its manifest is that of step 7"),
    "a file outside": (lambda p: change(p, files={"../x": {"size": 1}}), "'../x', which lies outside"),
    "no files": (lambda p: change(p, files=None), "its manifest is unreadable"),
    "file is a folder": (
        lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir())[1],
        "state.json has",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str, save: Save) -> None:
    save(tmp_path, 1)
    do, problem = DAMAGE[damage]
    do(save(tmp_path, 2).path)
    said: list[str] = []
    found = checkpoint.find_latest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0] and problem in said[0]


def test_asking_for_a_damaged_or_absent_step_names_what_there_is(tmp_path: Path, save: Save) -> None:
    with pytest.raises(CheckpointError, match="none was saved"):
        checkpoint.find_step(tmp_path, None)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no valid checkpoint of step 5") as error:
        checkpoint.find_step(tmp_path, 5)
    assert error.value.remedy == "steps there: 1"


def in_earlier_format(run: Path, step: int, number: int) -> Path:
    """What versions before format 3 wrote, as far as it is read."""
    path = checkpoint.checkpoints_path(run) / f"step-{step:08d}"
    path.mkdir(parents=True)
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, path / "model.safetensors", metadata={"format": "pt"})
    save_file({"exp_avg/w": torch.ones(2, 3)}, path / "optim.safetensors", metadata={"format": "pt"})
    (path / "state.json").write_text("{}")
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"format": number, "step": step, "files": files}))
    return path


@pytest.mark.parametrize("number", [1, 2])
def test_earlier_formats_are_read(tmp_path: Path, number: int) -> None:
    path = in_earlier_format(tmp_path, 4, number)
    found = checkpoint.find_step(tmp_path, None)
    assert set(found.groups) == {"model", "optim"}
    assert torch.equal(found.tensors("model")["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found.tensors("optim")["exp_avg/w"], torch.ones(2, 3))
    assert checkpoint.validate(path, thoroughly=True) is None
    flip(path / "model.safetensors")
    assert checkpoint.validate(path) == "model.safetensors does not match its checksum"


@pytest.mark.parametrize("kept", [["size"], ["sha256"], ["size", "crc32"]])
def test_a_manifest_that_proves_nothing_is_none(tmp_path: Path, save: Save, kept: list[str]) -> None:
    path = save(tmp_path, 1).path
    files = json.loads((path / "manifest.json").read_text())["files"]
    change(path, files={name: {key: file.get(key, 0) for key in kept} for name, file in files.items()})
    assert checkpoint.validate(path) is not None
    assert checkpoint.validate(path, thoroughly=True) is not None


def test_each_checksum_is_compared_by_whom_it_is_for(tmp_path: Path, save: Save) -> None:
    """A start reads by xxh128; `lmssl verify` by both."""
    for step, name in ((1, "xxh128"), (2, "sha256")):
        path = save(tmp_path, step).path
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["model.safetensors"][name] = "0" * len(files["model.safetensors"][name])
        change(path, files=files)
        assert (checkpoint.validate(path) is None) == (name == "sha256")
        assert checkpoint.validate(path, thoroughly=True) == "model.safetensors does not match its checksum"


def test_a_part_that_the_manifest_leaves_out_is_missed(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path, 1).path
    (path / "model.safetensors").rename(path / "model-00002-of-00003.safetensors")
    files = json.loads((path / "manifest.json").read_text())["files"]
    change(path, files={"model-00002-of-00003.safetensors": files["model.safetensors"]})
    assert checkpoint.validate(path) == "model-00001-of-00003.safetensors is not in its manifest"


def test_going_back_removes_later_checkpoints_only(tmp_path: Path, save: Save) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert checkpoint.discard_after(tmp_path, 2) == [3, 4]
    assert checkpoint.discard_after(tmp_path, 2) == []
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1).path
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    remove(path)
    monkeypatch.undo()
    assert checkpoint.step_folders(tmp_path) == [] and list((tmp_path / "checkpoints").iterdir())
    sweep(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
