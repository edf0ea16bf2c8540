"""Rows of one document each: how long micro-batches are, compiled and not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lmssl.objective.base import _COLUMNS, MicroBatch
from lmssl.recipe.load import load_recipe
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from runs import small_recipe, write_recipe

LENGTH = 512
MODEL = {"kind": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def opened(folder: Path, text: Path, compile_mode: str) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Micro-batches of the first steps, and of the evaluation."""
    changes: dict[str, Any] = {"data.packing": "none", "data.sequence_length": LENGTH, "train.compile": compile_mode}
    changes |= {"model": MODEL, "objective": {"kind": "masked"}, "tokenizer": {"path": "tokenizer/wordpiece-8k"}}
    changes |= {"train.batch_tokens": 8 * LENGTH, "train.tokens": 24 * LENGTH, "train.micro_batch_sequences": 2}
    folder.mkdir()
    recipe = small_recipe(text, folder / "run", text.parent / "unpadded-cache", **changes)
    loaded = load_recipe(write_recipe(folder / "recipe.yaml", recipe)).recipe
    lock = RunLock(Path(loaded.out_path))
    session = open_session(loaded, lambda _: None, lock=lock)
    assert session.compiled == compile_mode
    try:
        with closing(session.batches()) as batches:
            trained = [micro for step in batches for micro in step]
        (split,) = session.stream.validation()
        return trained, list(session._validation_batches(split))
    finally:
        session.saver.close()
        session.backend.close()
        lock.release()


def columns(found: list[MicroBatch]) -> list[int]:
    return [micro.inputs["ids_BT"].shape[1] for micro in found]


def test_rows_end_with_the_longest_where_nothing_is_compiled(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmssl.train.opening.compile_module", lambda *_: None)  # at the first step, and none is made
    plain, evaluated = opened(tmp_path / "plain", text_folder, "off")
    compiled, same = opened(tmp_path / "compiled", text_folder, "model")
    assert len(plain) == len(compiled) == 12
    assert set(columns(compiled)) == {LENGTH}
    assert len(set(columns(plain))) > 3 and max(columns(plain)) <= LENGTH
    assert sum(columns(plain)) < 0.8 * sum(columns(compiled))
    for short, whole in zip(plain, compiled, strict=True):
        width = short.inputs["ids_BT"].shape[1]
        longest = int((whole.inputs["segments_BT"] != 0).sum(1).max())
        assert longest <= width < longest + _COLUMNS
        assert short.inputs["ids_BT"].equal(whole.inputs["ids_BT"][:, :width])
        assert short.counts == whole.counts and not whole.inputs["segments_BT"][:, width:].any()
    assert columns(evaluated) == columns(same) and max(columns(same)) <= LENGTH > min(columns(same))
