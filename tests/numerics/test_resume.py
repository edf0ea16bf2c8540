"""Interrupted and resumed equals uninterrupted, bit for bit: weights, optimiser, schedule, metrics, positions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.checkpoint.folder import step_path
from lmssl.model import native
from runs import assert_equal_runs, metrics, small_recipe, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDPIECE = {"tokenizer": {"path": "tokenizer/wordpiece-8k"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked": WORDPIECE
    | {
        "objective": {"kind": "masked", "final_rate": 0.1, "decay_ratio": 0.6, "strategy": "whole_word"},
        "model": {"kind": "bert", "hidden_dropout_prob": 0.1, **SIZES},
        "train.ema_decay": 0.99,
    },
    "hybrid": WORDPIECE | {"objective": {"kind": "hybrid", "final_rate": 0.1}, "model": {"kind": "llama", **SIZES}},
    "span": {
        "tokenizer": {"path": "tokenizer/t5-8k"},
        "objective": {"kind": "span"},
        "model": {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    },
}


def start(recipe: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lmssl", "train", str(recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(recipe: Path) -> None:
    process = start(recipe)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()


def interrupt_at(recipe: Path, run: Path, step: int, how: signal.Signals, *, saved: int | None = None) -> int:
    """Start, wait until a step is in the metrics, send the signal; returns the exit status.

    Args:
        saved: wait, too, until the checkpoint of this step is in its place. It is written while training goes on, so
            that steps of a few milliseconds are far ahead of it, and a kill then takes it as well.
    """
    process = start(recipe)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        whole = saved is None or step_path(run, saved).is_dir()
        if whole and any(row["step"] >= step for row in metrics(run)):
            process.send_signal(how)
            break
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, f"the run ended before step {step} could be interrupted: {stderr.decode()}"
    return process.returncode


needs_avx2 = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")
needs_bf16 = pytest.mark.skipif(not native.processor_can(torch.bfloat16), reason="no AVX-512 for bfloat16")


@pytest.mark.parametrize(
    "made",
    [
        "plainly",
        pytest.param("by kernels", marks=needs_avx2),
        pytest.param("by kernels in bfloat16", marks=[needs_bf16, pytest.mark.slow]),
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_killed_twice_equals_uninterrupted(tmp_path: Path, text_folder: Path, made: str) -> None:
    steps = {
        "plainly": {"train.kernels": "off"},
        "by kernels": {"train.kernels": "on", "train.precision": "fp32"},
        "by kernels in bfloat16": {"train.kernels": "on", "train.precision": "bf16"},
        "compiled": {"train.compile": "model"},
    }
    change = {"checkpoint.every_steps": 4, "evaluate.every_steps": 6, **steps[made]}
    whole = small_recipe(text_folder, tmp_path / "whole", tmp_path / "cache-a", steps=20, **change)
    finish(write_recipe(tmp_path / "whole.yaml", whole))
    killed = small_recipe(text_folder, tmp_path / "killed", tmp_path / "cache-b", steps=20, **change)
    recipe = write_recipe(tmp_path / "killed.yaml", killed)
    assert interrupt_at(recipe, tmp_path / "killed", 6, signal.SIGKILL, saved=4) == -signal.SIGKILL
    assert interrupt_at(recipe, tmp_path / "killed", 13, signal.SIGKILL) == -signal.SIGKILL
    finish(recipe)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    rows = metrics(tmp_path / "killed")
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 21))
    lines = (tmp_path / "killed" / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
    sessions = [json.loads(line) for line in lines]
    assert sessions[0]["from_step"] == 0
    assert all(session["from_step"] >= 4 for session in sessions[1:])
    assert made == "compiled" or all(session["kernels"] == made.startswith("by kernels") for session in sessions)


@pytest.mark.parametrize(
    "objective", ["masked", *(pytest.param(o, marks=pytest.mark.slow) for o in ("hybrid", "span"))]
)
def test_masks_and_their_rate_continue(tmp_path: Path, text_folder: Path, objective: str) -> None:
    """Killed while the rate goes down; the kill falls between checkpoints, so that steps are made twice."""
    change = {"checkpoint.every_steps": 5, **OBJECTIVES[objective]}
    whole = small_recipe(text_folder, tmp_path / "whole", tmp_path / "cache", steps=16, **change)
    finish(write_recipe(tmp_path / "whole.yaml", whole))
    killed = small_recipe(text_folder, tmp_path / "killed", tmp_path / "cache", steps=16, **change)
    recipe = write_recipe(tmp_path / "killed.yaml", killed)
    assert interrupt_at(recipe, tmp_path / "killed", 8, signal.SIGKILL) == -signal.SIGKILL
    finish(recipe)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed" / "sessions.jsonl").read_text(encoding="utf-8").count("\n") == 2
    if objective == "masked":
        targets = [row["num_targets"] for row in metrics(tmp_path / "killed") if row["kind"] == "train"]
        assert targets[-1] < 0.5 * targets[0]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues_to_an_equal_end(
    tmp_path: Path, text_folder: Path, how: signal.Signals
) -> None:
    """Logging every 7 steps, so that the signal falls inside an interval whose sums must survive."""
    change = {"train.log_every_steps": 7, "checkpoint.every_steps": None}
    whole = small_recipe(text_folder, tmp_path / "whole", tmp_path / "cache", steps=20, **change)
    finish(write_recipe(tmp_path / "whole.yaml", whole))
    stopped = small_recipe(text_folder, tmp_path / "stopped", tmp_path / "cache", steps=20, **change)
    recipe = write_recipe(tmp_path / "stopped.yaml", stopped)
    assert interrupt_at(recipe, tmp_path / "stopped", 7, how) == 75
    assert 7 <= checkpoint.find_step(tmp_path / "stopped", None).step < 20  # the step it fell in is dropped
    finish(recipe)
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_a_finished_run_does_nothing_more(tmp_path: Path, text_folder: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2))
    finish(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    saved = os.stat(checkpoint.find_step(tmp_path / "run", None).path).st_mtime_ns
    finish(recipe)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert os.stat(checkpoint.find_step(tmp_path / "run", None).path).st_mtime_ns == saved
