"""Started as on several machines: two launchers that meet on one port, and Slurm's script with a small Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 8
SRUN = """#!/bin/bash
# Starts the tasks as Slurm would, on this machine, and ends with the largest of their exit codes.
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
echo "${tasks[@]}" > "$FAKE_SLURM/tasks"
code=0
for task in "${tasks[@]}"; do
  wait "$task" || { ended=$?; if ((ended > code)); then code=$ended; fi; }
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$FAKE_SLURM/requeued"; fi
"""


def recipe_of(folder: Path, text: Path, name: str, *, steps: int = STEPS, **changes: Any) -> Path:
    sizes = {"model.hidden_size": 32, "model.intermediate_size": 64, "train.precision": "fp32"}
    recipe = small_recipe(text, folder / name, text.parent / "launchers-cache", steps=steps, **(sizes | changes))
    return write_recipe(folder / f"{name}.yaml", recipe)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def assert_same_end(ours: Path, theirs: Path) -> None:
    a, b = (checkpoint.find_step(run, None) for run in (ours, theirs))
    assert a.step == b.step
    first, second = tensors_of(a, "model"), tensors_of(b, "model")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-5, rtol=0)
    pairs = zip(metrics(ours), metrics(theirs), strict=True)
    assert all(y["loss"] == pytest.approx(x["loss"], rel=5e-6) for x, y in pairs)


@pytest.mark.parametrize("file", ["ddp", "zero2"])
def test_two_launchers_on_two_machines_train_one_run(file: str, tmp_path: Path, text_folder: Path, root: Path) -> None:
    """The commands of recipes/launch/hosts.md, on one machine that is two."""
    train(load_recipe(recipe_of(tmp_path, text_folder, "one")))
    recipe = recipe_of(tmp_path, text_folder, "two")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        str(root / f"recipes/launch/{file}.yaml"),
        "--num_machines",
        "2",
        "--num_processes",
        "2",
    ]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    more = {"ACCELERATE_USE_CPU": "true"} if file == "ddp" else {}
    command += [] if file == "ddp" else ["--deepspeed_multinode_launcher", "standard"]
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "-m", "lmssl", "train", str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**more),
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=800)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)[-6000:]
    assert_same_end(tmp_path / "one", tmp_path / "two")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2"}
    path = f"{folder}:{os.environ['PATH']}"
    return environment(ACCELERATE_USE_CPU="true", FAKE_SLURM=str(folder), PATH=path, **job)


def test_a_slurm_job_that_is_signalled_saves_and_goes_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path, text_folder: Path, root: Path
) -> None:
    steps = 60
    train(load_recipe(recipe_of(tmp_path, text_folder, "whole", steps=steps)))
    run, fake = tmp_path / "job", Path(slurm["FAKE_SLURM"])
    recipe = recipe_of(tmp_path, text_folder, "job", steps=steps)
    script = [str(root / "recipes/launch/slurm.sh"), str(root / "recipes/launch/ddp.yaml"), str(recipe)]
    job = subprocess.Popen(script, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and job.poll() is None and not any(row["step"] >= 3 for row in metrics(run)):
        time.sleep(0.02)
    for task in (fake / "tasks").read_text(encoding="utf-8").split():
        os.kill(int(task), signal.SIGTERM)  # what --signal=TERM@300 does
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 75, said[-6000:]
    assert (fake / "requeued").read_text(encoding="utf-8").split() == ["requeue", slurm["SLURM_JOB_ID"]]
    assert 3 <= checkpoint.find_step(run, None).step < steps
    (fake / "requeued").unlink()
    again = subprocess.run(script, env=slurm, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, (again.stdout + again.stderr)[-6000:]
    assert not (fake / "requeued").exists()
    assert_same_end(tmp_path / "whole", run)


def test_a_slurm_job_that_fails_does_not_go_back(slurm: dict[str, str], tmp_path: Path, root: Path) -> None:
    script = [str(root / "recipes/launch/slurm.sh"), str(root / "recipes/launch/ddp.yaml"), str(tmp_path / "no.yaml")]
    done = subprocess.run(script, env=slurm, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "there is no such recipe" in done.stderr
    assert not (Path(slurm["FAKE_SLURM"]) / "requeued").exists()
