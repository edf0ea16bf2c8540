"""What two processes send each other in a step: gradients once, however many micro-batches there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MICRO_BATCHES = 2
GRADIENTS = {"ddp": ("allreduce", 2), "fsdp2": ("reduce_scatter_base", 1)}
"""What exchanges gradients, and how many times (n - 1) / n of their bytes."""
LEAST = {"ddp": 2, "fsdp2": 2 * MICRO_BATCHES + 1}
"""The same of everything: FSDP2 gathers weights for each forward and each backward."""
SMALL_BYTES = 1000
"""Counts, losses, norms."""


@pytest.mark.parametrize("backend", LEAST)
def test_a_step_sends_no_more_than_the_least(backend: str, tmp_path: Path, text_folder: Path, root: Path) -> None:
    recipe = small_recipe(
        text_folder,
        tmp_path / "run",
        tmp_path / "cache",
        steps=3,
        **{"train.micro_batch_sequences": 8 // MICRO_BATCHES, "data.validation": None},  # of 8 sequences a process
    )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(root / f"recipes/launch/{backend}.yaml"), "--num_processes", "2"]
    command += [
        "--main_process_port",
        "0",
        str(root / "benchmarks/counted_training.py"),
        str(tmp_path / "counted.json"),
    ]
    more = {"ACCELERATE_USE_CPU": "true"} if backend == "ddp" else {}
    done = subprocess.run(
        [*command, str(write_recipe(tmp_path / "recipe.yaml", recipe))],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = json.loads((tmp_path / "counted.json").read_text(encoding="utf-8"))
    assert found["ranks"] == 2
    half = 4 * found["parameters"] / 2
    name, times = GRADIENTS[backend]
    assert found["sent_bytes"][name] == pytest.approx(times * half, abs=SMALL_BYTES)
    assert sum(found["sent_bytes"].values()) <= LEAST[backend] * half + SMALL_BYTES
