"""`lmssl verify` names the damaged checkpoints and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmssl.checkpoint import Checkpoint
from lmssl.checkpoint.verify import verify
from lmssl.cli import main

Save = Callable[..., Checkpoint]


def test_a_whole_run(tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, validation_loss=3.25)
    save(tmp_path, 2, finite=False)
    assert verify(tmp_path, print) == [1, 2]
    assert main(["verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:]
    assert lines[0].startswith("step-00000001: whole, ") and lines[0].endswith("in 2 files, validation loss 3.2500")
    assert lines[1].endswith("in 2 files, losses before it were not finite")


def test_damaged_ones_are_named_each_with_its_reason(
    tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    content = bytearray((folder / "step-00000004/model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "step-00000004/model.safetensors").write_bytes(content)
    (folder / "step-00000002/manifest.json").write_text("")
    (folder / ".tmp-step-00000005").mkdir()
    assert main(["verify", str(tmp_path)]) == 6
    said = capsys.readouterr()
    assert "step-00000004: damaged: model.safetensors does not match its checksum" in said.out
    assert "step-00000002: damaged: its manifest is unreadable" in said.out
    assert "step-00000003: whole" in said.out and ".tmp-step-00000005: left behind" in said.out
    assert "2 of 4 checkpoints are damaged: of step 2, 4" in said.err
    assert "the run continues from step 3" in said.err


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_checkpoints(tmp_path: Path, there: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path if there else tmp_path / "nothing"
    assert main(["verify", str(run)]) == 6
    assert "no checkpoint was saved" in capsys.readouterr().err
