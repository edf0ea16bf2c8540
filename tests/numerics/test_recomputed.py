"""Activation checkpointing changes memory and time, and no number: whole runs, compiled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.launch import can_compile
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler")


def run(folder: Path, text: Path, label: str, /, *, steps: int = 4, **change: Any) -> Path:
    change = {"model": {"kind": "llama", "attention_dropout": 0.1, **SIZES}, "train.precision": "fp32", **change}
    content = small_recipe(text, folder / label, folder / "cache", steps=steps, **change)
    return train(load_recipe(write_recipe(folder / f"{label}.yaml", content)))


def losses(path: Path) -> list[float]:
    return [row["loss"] for row in metrics(path) if row["kind"] == "train"]


def test_a_run_ends_with_equal_weights_and_may_change_it_in_between(tmp_path: Path, text_folder: Path) -> None:
    """With dropout, and with a part of the steps made without it."""
    change = {"schedule": {"kind": "constant"}}
    plain = run(tmp_path, text_folder, "plain", steps=6, **change)
    full = {**change, "train.activation_checkpointing": "full"}
    run(tmp_path, text_folder, "full", steps=3, **change)
    path = run(tmp_path, text_folder, "full", steps=6, **full)
    assert losses(path) == losses(plain)
    a, b = (checkpoint.find_step(p, None).tensors("model") for p in (plain, path))
    assert all(tensor.equal(b[name]) for name, tensor in a.items())
    second = run(tmp_path, text_folder, "second", steps=6, **{**change, "train.activation_checkpointing": 2})
    assert losses(second) == losses(plain)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # while tracing
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what the compiler imports
@pytest.mark.parametrize(("family", "mode"), [("llama", "layers"), ("llama", "model"), ("t5", "layers")])
def test_compiled_runs_lose_what_plain_ones_do(tmp_path: Path, text_folder: Path, mode: str, family: str) -> None:
    change: dict[str, Any] = {"model": {"kind": "llama", **SIZES}}
    if family == "t5":
        change = {
            "tokenizer": {"path": "tokenizer/t5-8k"},
            "objective": {"kind": "span"},
            "model": {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2},
            # Whole files, whose examples are long: rows of one shape, which are compiled once and not twice.
            "data.mixture": [{"name": "text", "kind": "text", "path": str(text_folder / "*.txt")}],
            "data.validation": None,
        }
    plain = run(tmp_path, text_folder, "plain", **change)
    compiled = {**change, "train.compile": mode, "train.activation_checkpointing": "full"}
    assert losses(run(tmp_path, text_folder, "compiled", **compiled)) == pytest.approx(losses(plain), rel=1e-4)
