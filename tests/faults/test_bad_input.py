"""Bad input on the command line: one clear error, an exit code, and nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl import cli
from runs import small_recipe, write_recipe


def lines(folder: Path, *rows: bytes) -> str:
    path = folder / "rows.jsonl"
    good = b'{"text": "' + b"a sentence of words, long enough to count. " * 20 + b'"}\n'
    path.write_bytes(good * 40 + b"".join(rows))
    return str(path)


def jsonl(path: str, **more: Any) -> dict[str, Any]:
    return {"data.mixture": [{"name": "rows", "kind": "jsonl", "path": path, **more}]}


def text(path: Path, content: bytes | None) -> dict[str, Any]:
    if content is not None:
        path.write_bytes(content)
    return {"data.mixture": [{"name": "text", "kind": "text", "path": str(path)}]}


Change = Callable[[Path], dict[str, Any]]
CASES: dict[str, tuple[int, list[str], Change]] = {
    "missing file": (3, ["absent.txt"], lambda d: text(d / "absent.txt", None)),
    "glob matching nothing": (3, ["*.md"], lambda d: text(d / "*.md", None)),
    "empty corpus": (3, ["no text"], lambda d: text(d / "empty.txt", b" \n\n ")),
    "less text than one batch": (
        3,
        ["sequences", "batch_tokens"],
        lambda d: text(d / "short.txt", b"A few words. " * 9),
    ),
    "bad UTF-8": (
        3,
        ["rows.jsonl", "UTF-8", "max_bad_records"],
        lambda d: jsonl(lines(d, b'{"text": "\xff\xfe"}\n')) | {"data.max_bad_records": 0},
    ),
    "malformed JSON line": (
        3,
        ["rows.jsonl", "JSON", "max_bad_records"],
        lambda d: jsonl(lines(d, b'{"text": "cut')) | {"data.max_bad_records": 0},
    ),
    "wrong field name": (3, ["'txt'", "'text'", "rows.jsonl"], lambda d: jsonl(lines(d), field="txt")),
    "tokenizer larger than the vocabulary": (5, ["4096", "1000", "vocab_size"], lambda d: {"model.vocab_size": 1000}),
    "sequence longer than the positions": (
        2,
        ["sequence_length", "64", "32"],
        lambda d: {"model.max_position_embeddings": 32},
    ),
    "tokenizer folder missing": (4, ["no-such"], lambda d: {"tokenizer.path": str(d / "no-such")}),
    "output inside a file": (6, ["out"], lambda d: {"out": _file(d) / "run"}),
}


def _file(folder: Path) -> Path:
    path = folder / "a-file"
    path.write_text("")
    return path


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(
    case: str, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMSSL_DEBUG", raising=False)
    code, words, change = CASES[case]
    changes = change(tmp_path)
    out = changes.pop("out", tmp_path / "run")
    recipe = small_recipe(text_folder, out, tmp_path / "cache", **changes)
    got = cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))])
    said = capsys.readouterr().err
    assert got == code, said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert "where:" in said and "remedy:" in said
    for word in words:
        assert word in said
    assert not out.exists()


def test_bad_records_below_the_ceiling_are_set_aside_and_counted(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = lines(tmp_path, b'{"text": "\xff"}\n', b"not json\n", b'{"text": 7}\n')
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2, **jsonl(bad))
    recipe["data"]["validation"] = None
    assert cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 0
    assert "3 bad records" in capsys.readouterr().out
    found = list((tmp_path / "cache").rglob("bad.jsonl"))
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in found) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; tests/train/test_run.py plays the refusal")
def test_an_unwritable_output(tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    recipe = small_recipe(text_folder, tmp_path / "closed" / "run", tmp_path / "cache")
    assert cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 6
    assert "cannot be written" in capsys.readouterr().err
