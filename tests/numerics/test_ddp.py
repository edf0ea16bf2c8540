"""Two processes under DDP train the same run as one, with unequal target counts on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from runs import metrics, small_recipe, tensors_of, write_recipe

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
            "train.batch_tokens": 64 * 24,
            "train.tokens": 64 * 24 * 20,
            "evaluate.every_steps": 10,
            **changes,
        },
    )
    return write_recipe(tmp_path / f"{name}.yaml", recipe)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(tmp_path: Path, text_folder: Path, launcher: str) -> None:
    one = launch(["-m", "lmssl", "train", str(recipe_of(tmp_path, text_folder, "one"))])
    assert one.returncode == 0, one.stderr
    both = [*LAUNCHERS[launcher], "-m", "lmssl", "train", str(recipe_of(tmp_path, text_folder, "two"))]
    two = launch(both, ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert (a["kind"], a["step"], a["num_targets"]) == (b["kind"], b["step"], b["num_targets"])
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
    ours = tensors_of(checkpoint.find_step(tmp_path / "one", None), "model.safetensors")
    theirs = tensors_of(checkpoint.find_step(tmp_path / "two", None), "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3)


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path: Path, text_folder: Path) -> None:
    """Two launcher processes, and a variable that hides this from accelerate: they would train apart."""
    recipe = recipe_of(tmp_path, text_folder, "run")
    done = launch(["-m", "lmssl", "train", str(recipe)], WORLD_SIZE="2")
    assert done.returncode == 8
    assert "started 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_launch_file_that_contradicts_the_precision_is_refused(tmp_path: Path, text_folder: Path) -> None:
    recipe = recipe_of(tmp_path, text_folder, "run")
    done = launch(["-m", "lmssl", "train", str(recipe)], ACCELERATE_MIXED_PRECISION="bf16")
    assert done.returncode == 8
    assert "mixed_precision: bf16" in done.stderr
