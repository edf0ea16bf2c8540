"""Every shipped recipe trains: one step of a shrunken copy through the real loop, on text of the test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lmssl.recipe.load import load_recipe
from lmssl.shipped import shipped_root
from lmssl.train.run import train
from runs import metrics

RECIPES = sorted(p.relative_to(shipped_root()) for p in (shipped_root() / "recipes").rglob("*.yaml"))
TRAINABLE = [p for p in RECIPES if not {"launch", "continue"} & {*p.parts}]  # the latter need a model to go on with
ROTARY = [
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
]
ENCODER = ROTARY[:4]
SHRINK = {
    "llama": ROTARY,
    "qwen3": ROTARY,
    "gpt2": ["model.n_embd=64", "model.n_layer=2", "model.n_head=4"],
    "bert": ENCODER,
    "modernbert": ENCODER,
    "electra": [*ENCODER, "model.embedding_size=32"],
    "t5": ["model.d_model=64", "model.d_kv=16", "model.d_ff=128", "model.num_layers=2", "model.num_heads=4"],
}


@pytest.mark.parametrize("path", TRAINABLE, ids=str)
def test_one_shrunken_step(path: Path, tmp_path: Path, text_folder: Path) -> None:
    """Two small layers, one short batch; everything else is the recipe's."""
    recipe = load_recipe(shipped_root() / path).recipe
    mixture = [{"name": "text", "kind": "text", "path": str(text_folder / "*.txt"), "document": "paragraph"}]
    overrides = [
        *SHRINK[recipe.model.kind],
        f"out={tmp_path / 'run'}",
        f"data.cache={tmp_path / 'cache'}",
        f"data.mixture={json.dumps(mixture)}",
        "data.sequence_length=32",
        "data.stages=[]",
        "data.workers=0",
        "data.validation.tokens=64",
        "schedule.warmup_tokens=0",
        "train.tokens=64",
        "train.batch_tokens=64",
        "train.batch_warmup=null",
        "train.micro_batch_sequences=2",
        "train.compile=off",
    ]
    out = train(load_recipe(shipped_root() / path, overrides))
    asked = ["suite"] if recipe.evaluate.samples is not None else []
    kinds = ["evaluate", *asked, "train", "evaluate", *asked]
    assert [r["kind"] for r in metrics(out)] == kinds
    rows = [r for r in metrics(out) if r["kind"] != "suite"]
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(_vocabulary(out)), rel=0.1)


def _vocabulary(out: Path) -> int:
    config = json.loads(next(out.glob("checkpoints/*/config.json")).read_text(encoding="utf-8"))
    return int(config["vocab_size"])
