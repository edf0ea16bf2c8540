"""Runs of several processes on CPU, launched as a user would or many in one launch, and how they are compared.

Paragraphs one by one in short rows, so that the ranks' target counts differ; three micro-batches a step, a clipped
gradient, averages of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from runs import metrics, small_recipe, tensors_of, write_recipe

TESTS = Path(__file__).parent
STEPS, HALF = 20, 10
GROUPS = ("model", "optim", "ema")
HANG_SECONDS = 240
"""Ranks that wait for each other so long say where, before the launch is given up."""


def recipe_of(folder: Path, text: Path, name: str, **changes: Any) -> Path:
    """A recipe of 24 rows a step in micro-batches of 5: three a rank, the last of them short."""
    recipe = small_recipe(
        text,
        folder / name,
        text.parent / "parity-cache",
        steps=STEPS,
        **{
            "data.packing": "none",
            "model.hidden_size": 32,
            "model.intermediate_size": 64,
            "model.tie_word_embeddings": True,
            "optim.max_grad_norm": 0.5,
            "train.precision": "fp32",
            "train.micro_batch_sequences": 5,
            "train.hang_seconds": HANG_SECONDS,
            "train.batch_tokens": 64 * 24,
            "train.tokens": 64 * 24 * STEPS,
            "train.ema_decay": 0.9,
            "evaluate.every_steps": HALF,
            "checkpoint.every_steps": HALF,
            **changes,
        },
    )
    return write_recipe(folder / f"{name}.yaml", recipe)


def finish(command: list[str], **environment: str) -> str:
    """Run a command of this Python to its end; what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def launch(root: Path, file: str, recipe: Path, *more: str, processes: int = 2) -> None:
    """As a user would, with a file of recipes/launch; how many processes comes from the command line."""
    command = ["-m", "accelerate.commands.launch", "--config_file", str(root / f"recipes/launch/{file}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *more]
    through_shim = [str(TESTS / "numerics" / "fsdp_cpu.py")] if "fsdp" in file else ["-m", "lmssl"]
    environment = {"ACCELERATE_USE_CPU": "true"} if file == "ddp" else {}
    finish([*command, *through_shim, "train", str(recipe)], **environment)


def run_segments(plan: Path, segments: list[dict[str, Any]], *, processes: int = 2) -> str:
    """Many runs in the processes of one launch; what they printed."""
    plan.write_text(json.dumps(segments), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return finish([*torchrun, str(TESTS / "numerics" / "segments.py"), str(plan)])


def differences(ours: Path, theirs: Path, step: int) -> dict[str, float]:
    """The largest absolute difference of a number in each group of tensors of two runs' checkpoints."""
    a, b = (checkpoint.find_step(run, step) for run in (ours, theirs))
    found = {}
    for group in GROUPS:
        first, second = tensors_of(a, group), tensors_of(b, group)
        assert first.keys() == second.keys()
        assert all(first[name].shape == second[name].shape for name in first)
        found[group] = max(float((first[name] - second[name]).abs().max()) for name in first)
    return found


def assert_same_run(ours: Path, theirs: Path, *, loss: float, weights: float) -> None:
    """Each step's loss, counts and norm, evaluations, and all tensors at the end."""
    rows = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert len(rows) == STEPS + 3
    for a, b in rows:
        same = ("kind", "step", "tokens", "num_targets", "next_position", "lr")
        assert [a.get(name) for name in same] == [b.get(name) for name in same]
        assert b["loss"] == pytest.approx(a["loss"], rel=loss)
        if a["kind"] == "train":
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=100 * loss)
    found = differences(ours, theirs, STEPS)
    print(f"{theirs.name}: loss {max(abs(a['loss'] - b['loss']) for a, b in rows):.1e}", found)
    assert max(found.values()) <= weights, found
    steps = [
        value for name, value in tensors_of(checkpoint.find_step(theirs, STEPS), "optim").items() if "step/" in name
    ]
    assert steps
    assert all(float(value) == STEPS for value in steps)


def weights_hash(recipe: Path) -> str:
    """Of the names, shapes and bits of all weights of a run as it is opened; every rank must call."""
    lock = RunLock(Path(load_recipe(recipe).recipe.out_path))
    session = open_session(load_recipe(recipe).recipe, print, lock=lock)
    found = hashlib.sha256()
    for name, part in sorted(session.backend.weight_parts().items()):
        values = part.whole().detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name} {tuple(values.shape)}".encode())
        found.update(values.numpy().tobytes())
    session.saver.close()
    session.backend.close()
    lock.release()
    return found.hexdigest()
