"""Twenty losses of each family on a fixed text: a change that should not move numbers must not move these.

To accept new numbers, run with LMSSL_UPDATE_GOLDEN=1 and say why in CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

GOLDEN = Path(__file__).parent / "losses.json"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model": {"kind": "llama", "num_key_value_heads": 1}},
    "qwen3": {"model": {"kind": "qwen3", "tie_word_embeddings": False}},
    "gpt2": {"model": {"kind": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}},
    "masked": {
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "objective": {"kind": "masked", "final_rate": 0.15},
        "model": {"kind": "bert"},
    },
    "hybrid": {
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "objective": {"kind": "hybrid", "strategy": "whole_word"},
        "model": {"kind": "llama"},
    },
    "span": {
        "tokenizer": {"path": "tokenizer/t5-8k"},
        "objective": {"kind": "span"},
        "model": {"kind": "t5", "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2},
    },
}
TOLERANCE = 2e-4
"""Relative, in float32: processors and thread counts differ in the order of summation, and twenty steps amplify it."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Sentences of the licence's words in an order drawn once: the same on every machine and Python."""
    words = sorted(set((root / "LICENSE").read_text(encoding="utf-8").split()))
    random = np.random.Generator(np.random.Philox(key=7))
    folder = tmp_path_factory.mktemp("golden")
    for number in range(3):
        lengths = random.integers(5, 60, 150)
        picked = [" ".join(words[i] for i in random.zipf(1.3, n) % len(words)) for n in lengths]
        (folder / f"{number}.txt").write_text("\n\n".join(picked), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_losses(family: str, text: Path, tmp_path: Path) -> None:
    recipe = small_recipe(text, tmp_path / "run", tmp_path / "cache", steps=20, **{"train.precision": "fp32"})
    sections = FAMILIES[family]
    if sections["model"]["kind"] in ("gpt2", "t5"):  # which name their sizes otherwise
        recipe["model"] = {}
    recipe |= sections | {"model": recipe["model"] | sections["model"]}
    out = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    rows = metrics(out)
    found = {
        "train": [round(r["loss"], 6) for r in rows if r["kind"] == "train"],
        "bits_per_byte": [round(r["bits_per_byte"], 6) for r in rows if r["kind"] == "evaluate"],
    }
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("LMSSL_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, family: found}, indent=1) + "\n", encoding="utf-8")
        golden[family] = found
    assert found["train"] == pytest.approx(golden[family]["train"], rel=TOLERANCE)
    assert found["bits_per_byte"] == pytest.approx(golden[family]["bits_per_byte"], rel=TOLERANCE)
