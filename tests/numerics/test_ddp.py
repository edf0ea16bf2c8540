"""Two processes under DDP train the same run as one, with unequal target counts on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launched_runs import HANG_SECONDS, run_segments
from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_lines, write_recipe

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "29612",
    ],
}


ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked": {
        "objective": {"kind": "masked", "final_rate": 0.15},
        "model": {"kind": "bert", **ENCODER},
        "data.packing": "none",
    },
    "masked-packed": {
        "objective": {"kind": "masked", "strategy": "span"},
        "model": {"kind": "modernbert", "local_attention": 16, **ENCODER},
        "data.packing": "best_fit",
        "train.batch_warmup": {"from_tokens": 64 * 8, "tokens": 64 * 24 * 5},
    },
    "hybrid": {
        "objective": {"kind": "hybrid", "masked_ratio": 0.25},
        "model": {"kind": "llama", **ENCODER},
        "data.packing": "none",
    },
}


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def recipe_of(tmp_path: Path, text_folder: Path, name: str, **changes: Any) -> Path:
    """Paragraphs one by one and short rows, so that target counts differ much; 24 rows in micro-batches of 5."""
    recipe = small_recipe(
        text_folder,
        tmp_path / name,
        tmp_path / "cache",
        steps=20,
        **{
            "data.packing": "none",
            "train.precision": "fp32",
            "train.micro_batch_sequences": 5,
            "train.hang_seconds": HANG_SECONDS,
            "train.batch_tokens": 64 * 24,
            "train.tokens": 64 * 24 * 20,
            "evaluate.every_steps": 10,
            **changes,
        },
    )
    return write_recipe(tmp_path / f"{name}.yaml", recipe)


def with_odd_records(folder: Path, text_folder: Path) -> dict[str, Any]:
    """The texts, and beside them lines that are no JSON and lines with evaluation text."""
    quote = "seven brave sailors on a small boat crossed the wide sea and found an island of glass"
    lines = [
        "broken" if i % 12 == 5 else json.dumps({"text": f"{i} came {quote if i % 9 == 4 else 'from afar'} and stayed"})
        for i in range(300)
    ]
    (folder / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_lines(folder / "evaluation.jsonl", [{"text": quote}])
    mixture = small_recipe(text_folder, folder, folder)["data"]["mixture"]
    odd = {"name": "odd", "kind": "jsonl", "path": str(folder / "odd.jsonl"), "weight": 0.2}
    return {
        "data.mixture": [{**mixture[0], "weight": 0.8}, odd],
        "data.filters": {"decontaminate": {"path": str(folder / "evaluation.jsonl")}},
        "data.chunk_bytes": 4096,
        "data.window_chunks": 1,
    }


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(tmp_path: Path, text_folder: Path, launcher: str) -> None:
    odd = with_odd_records(tmp_path, text_folder)
    train(load_recipe(recipe_of(tmp_path, text_folder, "one", **odd)))
    both = [*LAUNCHERS[launcher], "-m", "lmssl", "train", str(recipe_of(tmp_path, text_folder, "two", **odd))]
    two = launch(both, ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert (a["kind"], a["step"], a["num_targets"]) == (b["kind"], b["step"], b["num_targets"])
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
    ours = tensors_of(checkpoint.find_step(tmp_path / "one", None), "model.safetensors")
    theirs = tensors_of(checkpoint.find_step(tmp_path / "two", None), "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3)
    for name in ("bad_records.jsonl", "dropped_overlaps.jsonl"):  # whichever rank read the windows that they are of
        lines = (tmp_path / "one" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) > 3
        assert (tmp_path / "two" / name).read_text(encoding="utf-8").splitlines() == lines


@pytest.fixture(scope="module")
def objectives(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Where a run of each objective lies, `one-..` of one process and `two-..` of two, which one launch started."""
    folder = tmp_path_factory.mktemp("objectives")
    plan = []
    for objective, changes in OBJECTIVES.items():
        changed = {
            "tokenizer": {"path": "tokenizer/wordpiece-8k"},
            "train.ema_decay": 0.99,
            "train.tokens": 64 * 24 * 8,
            "evaluate.every_steps": 4,
            "schedule.warmup_tokens": 64 * 24,
            **changes,
        }
        train(load_recipe(recipe_of(folder, text_folder, f"one-{objective}", **changed)))
        plan.append({"backend": "ddp", "recipe": str(recipe_of(folder, text_folder, f"two-{objective}", **changed))})
    run_segments(folder / "plan.json", plan)
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_term_and_metric_is_that_of_one_process(objectives: Path, objective: str) -> None:
    """Two terms with counts of their own, accuracies, averages of the weights; target counts differ between ranks."""
    one, two = (objectives / f"{processes}-{objective}" for processes in ("one", "two"))
    rows = list(zip(metrics(one), metrics(two), strict=True))
    names = {name for name in rows[-1][0] if name.startswith("loss") or name.endswith("accuracy")}
    assert names == (
        {"loss", "loss_masked", "causal_accuracy", "masked_accuracy"} if objective == "hybrid" else {"loss", "accuracy"}
    )
    for a, b in rows:
        same = ("kind", "step", "tokens", "num_targets", "next_position")
        assert [a.get(name) for name in same] == [b.get(name) for name in same]
        for name in names:
            # An argmax between two all but equal logits may fall otherwise.
            close = {"abs": 0.004} if name.endswith("accuracy") else {"rel": 2e-5}
            assert b[name] == pytest.approx(a[name], **close), name
        assert b["bits_per_byte"] == pytest.approx(a["bits_per_byte"], rel=3e-5)
    for file in ("model", "ema"):
        ours, theirs = (tensors_of(checkpoint.find_step(run, None), file) for run in (one, two))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3)


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path: Path, text_folder: Path) -> None:
    """Two launcher processes, and a variable that hides this from accelerate: they would train apart."""
    recipe = recipe_of(tmp_path, text_folder, "run")
    done = launch(["-m", "lmssl", "train", str(recipe)], WORLD_SIZE="2")
    assert done.returncode == 8
    assert "started 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
