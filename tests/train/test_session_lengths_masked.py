"""A masked run whose sequences grow, with another rotary base and a falling rate of masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from lmssl import checkpoint
from lmssl.checkpoint import checkpoints_path
from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run
from lmssl.objective.masking import ordinary_tokens
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

STEPS, CHANGE = 6, 3
POSITIONS = [16, 32, 48, 52, 56, 60]
"""Where steps end: 16 sequences of 64 tokens, then 4 of 256."""
CHANGES: dict[str, Any] = {
    "tokenizer": {"path": "tokenizer/wordpiece-8k"},
    "objective": {"kind": "masked", "rate": 0.3, "final_rate": 0.15, "decay_ratio": 0.5},
    "model": {
        "kind": "modernbert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 10_000,
    },
    "data.stages": [{"from_tokens": 1024 * CHANGE, "sequence_length": 256, "rope_theta": 160_000}],
    "train.ema_decay": 0.9,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 99,
}


def run(folder: Path, text: Path) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = small_recipe(text, folder / "run", text.parent / "masked-lengths-cache", steps=STEPS, **CHANGES)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    return run(tmp_path_factory.mktemp("whole"), text_folder)


class AsTheyAre:
    """Prepares nothing."""

    def __call__(self, batch: SequenceBatch) -> SequenceBatch:
        return batch


def test_each_step_has_the_targets_of_its_positions(whole: Path) -> None:
    """The rate falls by position, over those of the last half: 30 of 60, whatever their length."""
    rows = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [row["next_position"] for row in rows] == POSITIONS
    assert [row["tokens"] for row in rows] == [1024 * step for step in range(1, STEPS + 1)]
    recipe, tokenizer = load_recipe(whole / "recipe.yaml").recipe, load_tokenizer(whole / "tokenizer")
    stream = SequenceStream.open(
        recipe.data, tokenizer, recipe.data_seed, Path(recipe.data.cache), batches=recipe.batches
    )
    steps = training_batches(
        stream,
        plan=recipe.batches,
        micro_batch_sequences=16,
        world_size=1,
        rank=0,
        start_step=0,
        num_steps=STEPS,
        prepare=AsTheyAre(),
        workers=0,
    )
    for row, step in zip(rows, steps, strict=True):
        assert {batch.ids_BT.shape[1] for batch in step} == {64 if row["step"] <= CHANGE else 256}
        wanted, num_rows = 0.0, 0
        for batch in step:
            maskable_B = (ordinary_tokens(tokenizer)[batch.ids_BT] & (batch.segments_BT != 0)).sum(1)
            rate_B = 0.3 - 0.15 * np.clip((batch.positions_B - 30) / 30, 0, 1)
            wanted, num_rows = wanted + float((rate_B * maskable_B).sum()), num_rows + len(maskable_B)
        assert abs(row["num_targets"] - wanted) < num_rows  # each row's number is a whole one
    assert rows[0]["num_targets"] > 1.7 * rows[-1]["num_targets"]


@pytest.mark.parametrize("step", [CHANGE, CHANGE + 1])
def test_interrupted_around_the_change_equals_uninterrupted(
    tmp_path: Path, text_folder: Path, whole: Path, step: int
) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in checkpoints_path(copied).iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    run(tmp_path, text_folder)
    a, b = checkpoint.find_step(whole, None), checkpoint.find_step(copied, None)
    for name in ("model.safetensors", "optim.safetensors", "ema.safetensors"):
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert all(ours[key].equal(theirs[key]) for key in ours)
    for name in ("state.json", "ledger.jsonl", "config.json"):
        assert a.text(name) == b.text(name)


def test_checkpoints_and_exports_have_the_base_of_their_step_in_global_layers(whole: Path, tmp_path: Path) -> None:
    configs = [json.loads(checkpoint.find_step(whole, step).text("config.json")) for step in (CHANGE, STEPS)]
    assert [config["max_position_embeddings"] for config in configs] == [256, 256]
    done = export_run(whole, None, tmp_path / "out", lambda _: None)
    assert done.max_logits_difference < 1e-5
    found = [config["rope_parameters"] for config in configs] + [AutoConfig.from_pretrained(done.path).rope_parameters]
    assert [rope["full_attention"]["rope_theta"] for rope in found] == [10_000, 160_000, 160_000]
    assert [rope["sliding_attention"]["rope_theta"] for rope in found] == [10_000] * 3
