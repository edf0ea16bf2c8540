"""The lists of bad records and of documents with evaluation text beside a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl import checkpoint
from lmssl.data.chunk import text_hash
from lmssl.data.filters import is_held_out
from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError, Preempted
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train import loop as loop_module
from lmssl.train.run import train
from lmssl.train.set_aside import SetAside
from runs import small_recipe, write_recipe

QUOTE = "seven brave sailors on a small boat crossed the wide sea and found an island of glass"
WORDS = {"words": " ".join(QUOTE.split()[:13])}
BAD, DROPPED = "bad_records.jsonl", "dropped_overlaps.jsonl"
NUM_LINES = 900


def corpus(path: Path, text_folder: Path) -> None:
    """Paragraphs; every 9th quotes the evaluation text, and every 12th line is no JSON."""
    texts = "\n\n".join(found.read_text(encoding="utf-8") for found in sorted(text_folder.glob("*.txt"))).split("\n\n")
    lines = []
    for i, text in zip(range(NUM_LINES), (text for text in texts if len(text) > 40), strict=False):
        lines.append("broken" if i % 12 == 5 else json.dumps({"text": f"{i} {text} {QUOTE if i % 9 == 4 else ''}"}))
    assert len(lines) == NUM_LINES
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def recipe_of(folder: Path, text_folder: Path, *, steps: int, **changes: Any) -> dict[str, Any]:
    """Two corpora over equal files, of which the second is passed more slowly; windows of one chunk of 4 KiB."""
    folder.mkdir(exist_ok=True)
    (folder / "eval.jsonl").write_text(json.dumps({"text": QUOTE}))
    mixture = []
    for name, weight in (("a", 0.75), ("b", 0.25)):
        corpus(folder / f"{name}.jsonl", text_folder)
        mixture.append({"name": name, "kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "weight": weight})
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=steps, **changes)
    filters = {"decontaminate": {"path": str(folder / "eval.jsonl")}}
    small = {"chunk_bytes": 4096, "window_chunks": 1, "block_sequences": 16}
    recipe["data"] |= {"mixture": mixture, "filters": filters, **small}
    return recipe


def start(folder: Path, recipe: dict[str, Any]) -> Path:
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe), []))


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def stream_of(recipe: Path, run: Path) -> tuple[SequenceStream, int]:
    """The stream as the run's newest checkpoint has it, and its cursor."""
    loaded = load_recipe(recipe, []).recipe
    found = checkpoint.find_step(run, None)
    tokenizer = load_tokenizer(loaded.tokenizer.path)
    stream = SequenceStream.open(loaded.data, tokenizer, loaded.data_seed, Path(loaded.data.cache))
    return stream, json.loads(found.text("state.json"))["cursor"]


def expected(recipe: Path, run: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Bad records and dropped documents by the text itself, in the chunks that the run's positions touch."""
    stream, cursor = stream_of(recipe, run)
    bad, dropped = [], []
    for name in (corpus.name for corpus in stream.section.mixture):
        entries = stream.ledger_at(cursor).entries(name)
        paths = {path for n, e in enumerate(entries) if e.epoch == 0 for path in stream.plan(name, n).chunks}
        touched = [part for unit in stream.units(name) for part in unit.parts if _has(stream, unit, paths)]
        raw = (run.parent / f"{name}.jsonl").read_bytes()
        at = 0
        for line in raw.splitlines(keepends=True):
            if any(part.start <= at < part.stop for part in touched):
                if line == b"broken\n":
                    bad.append((name, str(run.parent / f"{name}.jsonl"), at))
                elif QUOTE.encode() in line and not _is_held_out(stream, json.loads(line)["text"]):
                    dropped.append((name, str(run.parent / f"{name}.jsonl"), at, 0))
            at += len(line)
    return bad, dropped


def _has(stream: SequenceStream, unit: Any, paths: set[Path]) -> bool:
    return stream._epochs[unit.corpus]._cache.get(unit, 0).path in paths


def _is_held_out(stream: SequenceStream, text: str) -> bool:
    hashes = np.array([text_hash(text)], np.uint64)
    return bool(is_held_out(hashes, stream.layout.seed, stream.layout.held_out_ratio)[0])


def listed(run: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The lists as `expected` gives them."""
    bad = [(row["corpus"], row["file"], row["start"]) for row in rows(run, BAD)]
    return bad, [(row["corpus"], row["file"], row["start"], row["offset"]) for row in rows(run, DROPPED)]


def test_both_lists_hold_what_the_run_passed(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path, recipe_of(tmp_path, text_folder, steps=12))
    bad, dropped = expected(tmp_path / "recipe.yaml", run)
    assert listed(run) == (bad, dropped)
    assert {name for name, *_ in dropped} == {"a", "b"}
    assert 10 < len(dropped) < 100 and 10 < len(bad) < 75  # the run does not reach all of them
    assert all("not JSON" in row["reason"] and row["record"] >= 0 for row in rows(run, BAD))
    assert all(row.items() >= WORDS.items() and row["record"] >= 0 for row in rows(run, DROPPED))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(bad)} bad records are listed in {run / BAD}" in said
    assert f"{len(dropped)} documents dropped because they contain evaluation text are listed" in said
    assert not list(run.glob(".tmp-*"))


def test_every_document_is_listed_once_over_epochs(tmp_path: Path, text_folder: Path) -> None:
    recipe = recipe_of(tmp_path, text_folder, steps=8, **{"data.validation": None})
    del recipe["data"]["mixture"][1]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    run = start(tmp_path, recipe)
    stream, cursor = stream_of(tmp_path / "recipe.yaml", run)
    assert stream.epochs_at(cursor)["a"] > 1
    assert (len(rows(run, BAD)), len(rows(run, DROPPED))) == (5, 7)
    assert listed(run) == expected(tmp_path / "recipe.yaml", run)


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_an_interrupted_run_has_its_lists_and_continues_them(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    whole = start(tmp_path / "whole", recipe_of(tmp_path / "whole", text_folder, steps=12))
    recipe = recipe_of(tmp_path / "part", text_folder, steps=12, **{"checkpoint.every_steps": 3})
    step = loop_module.train_step

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if named["step"] == 4:
            if how == "crash":
                raise DataError("the disk is gone")
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", interrupted)
        with pytest.raises(Preempted if how == "signal" else DataError):
            start(tmp_path / "part", recipe)
    run = tmp_path / "part" / "run"
    early = listed(run)
    assert 0 < len(early[1]) < len(listed(whole)[1])
    if how == "signal":
        assert early == expected(tmp_path / "part" / "recipe.yaml", run)
    start(tmp_path / "part", recipe)
    assert [len(found) for found in listed(run)] == [len(found) for found in listed(whole)]
    assert listed(run) == expected(tmp_path / "part" / "recipe.yaml", run)


def test_lists_appear_with_a_checkpoint(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process writes nothing more, so what it leaves is what stood there at the last save."""
    found = []
    save = checkpoint.Saver.save

    def noted(saver: checkpoint.Saver, step: int, **contents: Any) -> float:
        found.append((step, listed(tmp_path / "run")))
        return save(saver, step, **contents)

    monkeypatch.setattr(checkpoint.Saver, "save", noted)
    run = start(tmp_path, recipe_of(tmp_path, text_folder, steps=12, **{"checkpoint.every_steps": 6}))
    assert [step for step, _ in found] == [6, 12]
    assert len(found[0][1][1]) < len(found[1][1][1]) and found[1][1] == listed(run)


def test_lists_that_are_gone_or_damaged_are_made_anew(tmp_path: Path, text_folder: Path) -> None:
    recipe = recipe_of(tmp_path, text_folder, steps=12)
    run = start(tmp_path, recipe)
    before = {name: (run / name).read_bytes() for name in (BAD, DROPPED)}
    (run / BAD).write_bytes(before[BAD][:-9])
    (run / DROPPED).unlink()
    start(tmp_path, recipe)
    assert {name: (run / name).read_bytes() for name in (BAD, DROPPED)} == before
    (run / DROPPED).write_bytes(b"".join(before[DROPPED].splitlines(keepends=True)[2:]))
    start(tmp_path, recipe)
    assert (run / DROPPED).read_bytes() == before[DROPPED]


def test_a_list_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: SetAside, position: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SetAside, "write", full)
    run = start(tmp_path, recipe_of(tmp_path, text_folder, steps=4))
    assert checkpoint.find_step(run, None).step == 4
    assert "cannot be listed, training goes on" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_either_has_no_lists(tmp_path: Path, text_folder: Path) -> None:
    run = start(tmp_path, small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2))
    assert not (run / BAD).exists() and not (run / DROPPED).exists()
