"""Small recipes and readers of run folders that several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint


def small_recipe(text: Path, out: Path, cache: Path, *, steps: int = 4, **changes: Any) -> dict[str, Any]:
    """A recipe of a two-layer model on the text files of a folder; `changes` are dotted paths."""
    recipe: dict[str, Any] = {
        "name": "small",
        "out": str(out),
        "tokenizer": {"path": "tokenizer/bpe-4k"},
        "data": {
            "sequence_length": 64,
            "mixture": [{"name": "text", "kind": "text", "path": str(text / "*.txt"), "document": "paragraph"}],
            "validation": {"ratio": 0.05, "tokens": 2000},
            "cache": str(cache),
            "workers": 0,
        },
        "objective": {"kind": "causal"},
        "model": {
            "kind": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "optim": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup_tokens": 1024 * min(2, steps // 3), "decay_ratio": 0.3},
        "train": {
            "tokens": 1024 * steps,
            "batch_tokens": 1024,
            "micro_batch_sequences": 8,
            "log_every_steps": 1,
            "compile": "off",
        },
        "checkpoint": {"every_steps": None},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return recipe


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    """A JSONL file; returns its path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics; a run in progress may be writing the last."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def tensors_of(found: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a group, such as model, by the group's name or its file's."""
    return dict(found.tensors(name.removesuffix(".safetensors")))


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what differs between equal runs."""
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def assert_equal_runs(first: Path, second: Path) -> None:
    """Bit for bit the same last checkpoint and the same metrics."""
    a, b = checkpoint.find_step(first, None), checkpoint.find_step(second, None)
    assert a.step == b.step
    assert a.groups == b.groups
    for name in a.groups:
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)
    assert json.loads(a.text("state.json")) == json.loads(b.text("state.json"))
    assert a.text("ledger.jsonl") == b.text("ledger.jsonl")
    assert without_clock(metrics(first)) == without_clock(metrics(second))
