"""A marker tells which run an export is of, and which bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmssl.errors import ExportError
from lmssl.release.marker import MARKER, parse_marker, read_marker, run_identity, source_of, write_marker


def test_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "config.json").write_text("{}")
    write_marker(tmp_path, {"identity": "abc", "name": "x"})
    found = read_marker(tmp_path)
    assert (found["identity"], found["name"], list(found["files"])) == ("abc", "x", ["generator/config.json"])
    write_marker(tmp_path, found)
    assert read_marker(tmp_path) == found


def test_a_run_stays_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "sessions.jsonl").write_text('{"started": "2026-01-01"}\n')
    first = run_identity(run)
    with (run / "sessions.jsonl").open("a") as file:
        file.write('{"started": "2026-02-01"}\n')
    shutil.copytree(run, tmp_path / "moved")
    assert first == run_identity(run) == run_identity(tmp_path / "moved")
    (tmp_path / "moved" / "sessions.jsonl").write_text('{"started": "2026-03-01"}\n')
    assert run_identity(tmp_path / "moved") != first


def test_the_source_is_the_checkpoint_and_the_choice(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "tokens_seen": 30}))
    found = source_of(tmp_path, {"dtype": "float32"})
    assert (found["step"], found["tokens"], found["dtype"]) == (3, 30, "float32")
    (tmp_path / "manifest.json").write_text("{ }")
    assert source_of(tmp_path, {"dtype": "float32"}) != found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "identity": "x", "files": {}}', '{"format": 1}'])
def test_what_is_no_marker(text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no marker"):
        parse_marker(text, MARKER)
