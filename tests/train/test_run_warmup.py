"""Runs whose steps grow: what they log, and that an interruption in the growth changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmssl import checkpoint
from lmssl.checkpoint import checkpoints_path
from lmssl.data.batch import SequenceBatch
from lmssl.objective.causal import CausalObjective
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

SIZES = [4, 4, 8, 8, 12, 16, 16]
"""Sequences of 64 tokens; 256 to 1,024 tokens over 2,500."""


def run(folder: Path, text: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    warmup = {"train.batch_warmup": {"from_tokens": 256, "tokens": 2500}, "train.tokens": 4000}
    warmup["train.micro_batch_sequences"] = 4  # divides both ends: no row is empty
    saves = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 99, "train.log_every_steps": 2}
    recipe = small_recipe(text, folder / "run", text.parent / "warmup-cache", **(warmup | saves | changes))
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    return run(tmp_path_factory.mktemp("whole"), text_folder)


def without_clock(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in metrics(out)]


def test_lines_count_the_tokens_of_growing_steps(whole: Path) -> None:
    rows = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert [row["next_position"] for row in rows] == [sum(SIZES[: row["step"]]) for row in rows]
    assert [row["tokens"] for row in rows] == [64 * row["next_position"] for row in rows]
    before = 0
    for row in rows:  # every token is padding, a target or the first of a segment
        num_tokens, before = row["tokens"] - before, row["tokens"]
        padding = row["padding_ratio"] * num_tokens
        assert padding == pytest.approx(round(padding))
        assert 0.9 * num_tokens < padding + row["num_targets"] < num_tokens
    state = json.loads(checkpoint.find_step(whole, None).text("state.json"))
    assert state["step"] == 7 and state["cursor"] == 68 and state["tokens_seen"] == 68 * 64


@pytest.mark.parametrize("step", [1, 3, 5])
def test_interrupted_in_the_growth_equals_uninterrupted(
    tmp_path: Path, text_folder: Path, whole: Path, step: int
) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in checkpoints_path(copied).iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    run(tmp_path, text_folder)
    a, b = checkpoint.find_step(whole, None), checkpoint.find_step(copied, None)
    for name in ("model.safetensors", "optim.safetensors"):
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert all(ours[key].equal(theirs[key]) for key in ours)
    assert a.text("state.json") == b.text("state.json")
    assert a.text("ledger.jsonl") == b.text("ledger.jsonl")
    assert without_clock(whole) == without_clock(copied)


def test_micro_batches_may_change_and_read_the_same(
    tmp_path: Path, text_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    prepare = CausalObjective.prepare

    def spied(self: CausalObjective, batch: SequenceBatch, **settings: Any) -> Any:
        if not settings.get("evaluation"):
            seen.extend(position for position in batch.positions_B.tolist() if position >= 0)
        return prepare(self, batch, **settings)

    monkeypatch.setattr(CausalObjective, "prepare", spied)
    out = run(tmp_path, text_folder, **{"train.micro_batch_sequences": 5, "data.validation": None})
    assert sorted(seen) == list(range(sum(SIZES)))
    assert [row["tokens"] for row in metrics(out)] == [
        row["tokens"] for row in metrics(whole) if row["kind"] == "train"
    ]


def test_the_first_lines_say_both_sizes(tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, text_folder)
    assert "7 steps of 256 to 1,024 tokens" in capsys.readouterr().out
