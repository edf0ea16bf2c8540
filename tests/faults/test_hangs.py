"""Ranks that fail, die or hang: the others stop, say which rank it was, and nobody is left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from faulty_runs import faulty_run, interrupt, wait
from lmssl import checkpoint
from runs import metrics, small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def recipe_of(tmp_path: Path, text_folder: Path, **changes: object) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = {
        "train.micro_batch_sequences": 4,
        "data.validation": None,
        "checkpoint.every_steps": 1,
        "checkpoint.asynchronous": False,
    }
    small = {**{f"model.{key}": value for key, value in sizes.items()}, **few, **changes}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", **small)
    return write_recipe(tmp_path / "recipe.yaml", recipe)


ON_RANK_1 = "on_sums(lambda n, training: {what} if n == 4 and RANK == 1 else None)"


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_killed_rank_is_named_and_the_others_stop(tmp_path: Path, text_folder: Path, launcher: str) -> None:
    fault = ON_RANK_1.format(what="at('micro')")
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault, launcher=launcher) as run:
        interrupt(run.reached("micro", rank=1), signal.SIGKILL)
        began = time.monotonic()
        assert run.end() not in (0, 75), run.output
        assert time.monotonic() - began < 100
        assert "rank 1 is gone" in run.output
    assert checkpoint.find_step(tmp_path / "run", None).step == 1


def test_a_rank_that_stalls_is_named_with_its_phase_and_its_stack(tmp_path: Path, text_folder: Path) -> None:
    fault = "def stall():\n    time.sleep(10_000)\n" + ON_RANK_1.format(what="stall()")
    recipe = recipe_of(tmp_path, text_folder, **{"train.hang_seconds": 20})
    with faulty_run(tmp_path, recipe, fault, launcher="torchrun") as run:
        assert run.end() not in (0, 75), run.output
        assert "rank 1 hangs in forward of micro-batch 1 in step 2" in run.output
        assert "rank 0 hangs" not in run.output
        assert "in stall" in run.output  # the stack of the rank that hangs


SLOW_DISK = """
from lmssl.checkpoint import protocol
plain = protocol.write_tensors
def write_tensors(*args):
    time.sleep(9 if RANK == 1 or "RANK" not in os.environ else 0)
    return plain(*args)
protocol.write_tensors = write_tensors
"""


@pytest.mark.parametrize("launcher", [None, "torchrun"])
def test_a_save_that_takes_longer_than_hang_seconds_is_no_hang(
    tmp_path: Path, text_folder: Path, launcher: str | None
) -> None:
    """Two files of 9 s each; the other rank waits for them, which is no hang either."""
    recipe = recipe_of(tmp_path, text_folder, **{"train.hang_seconds": 12, "checkpoint.every_steps": None})
    with faulty_run(tmp_path, recipe, SLOW_DISK, launcher=launcher) as run:
        assert run.end() == 0, run.output
        assert "hangs" not in run.output
        paused = re.search(r"checkpoint of step 4: .* training paused ([\d.]+) s", run.output)
        assert paused is not None and float(paused[1]) > 17, run.output
    assert checkpoint.find_step(tmp_path / "run", None).step == 4


def test_a_stopped_rank_that_cannot_say_so_is_named_by_the_others(tmp_path: Path, text_folder: Path) -> None:
    """SIGSTOP also stops its watch."""
    fault = ON_RANK_1.format(what="os.kill(os.getpid(), signal.SIGSTOP)")
    recipe = recipe_of(tmp_path, text_folder, **{"train.hang_seconds": 15})
    with faulty_run(tmp_path, recipe, fault, launcher="torchrun") as run:
        wait(lambda: "rank 1 hangs" in run.output)
        for process in run.left():
            process.send_signal(signal.SIGCONT)
        assert run.end() not in (0, 75), run.output


def test_a_single_process_that_stalls_ends_itself(tmp_path: Path, text_folder: Path) -> None:
    fault = "on_sums(lambda n, training: time.sleep(10_000) if n == 5 else None)"
    recipe = recipe_of(tmp_path, text_folder, **{"train.hang_seconds": 15})
    with faulty_run(tmp_path, recipe, fault) as run:
        assert run.end() == 8, run.output
        assert "rank 0 hangs in forward of micro-batch 0 in step 2" in run.output


def test_an_error_on_one_rank_ends_the_others_with_its_name(tmp_path: Path, text_folder: Path) -> None:
    fault = "def fail():\n    from lmssl.errors import DataError\n    raise DataError('the disk is on fire')\n"
    with faulty_run(
        tmp_path, recipe_of(tmp_path, text_folder), fault + ON_RANK_1.format(what="fail()"), launcher="torchrun"
    ) as run:
        assert run.end() not in (0, 75), run.output
        assert "[rank 1] error: the disk is on fire" in run.output
        phase = "forward of micro-batch 1 in step 2"
        assert f"error: rank 1 failed in {phase}: the disk is on fire" in run.output


def test_memory_that_runs_out_is_explained(tmp_path: Path, text_folder: Path) -> None:
    fault = """
import torch
def fail():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
on_sums(lambda n, training: fail() if n == 6 else None)
"""
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault) as run:
        assert run.end() == 8, run.output
        assert "out of memory in step 2, with micro-batches of 4 x 64 tokens" in run.output
        for remedy in ("train.micro_batch_sequences", "train.activation_checkpointing", "fsdp2"):
            assert remedy in run.output
        assert "Traceback" not in run.output
    assert checkpoint.find_step(tmp_path / "run", None).step == 1


def test_a_killed_loader_process_ends_the_run(tmp_path: Path, text_folder: Path) -> None:
    fault = "on_sums(lambda n, training: at('micro') if n == 6 else None)"
    recipe = recipe_of(tmp_path, text_folder, **{"data.workers": 1, "train.tokens": 1024 * 400})
    with faulty_run(tmp_path, recipe, fault) as run:
        started = psutil.Process(run.reached("micro")).children(recursive=True)
        (loader,) = [child for child in started if child.parent() in started]  # the server that forked it is another
        loader.kill()
        run.go("micro")
        assert run.end() == 3, run.output
        assert "a loader process died" in run.output
        assert "Traceback" not in run.output


def test_a_clock_that_moves_backwards_changes_nothing(tmp_path: Path, text_folder: Path) -> None:
    fault = """
true = time.time
begun = true()
time.time = lambda: begun - 100 * (true() - begun)
"""
    recipe = recipe_of(tmp_path, text_folder, **{"train.hang_seconds": 60})
    with faulty_run(tmp_path, recipe, fault) as run:
        assert run.end() == 0, run.output
    assert all(row["time"]["seconds"] > 0 for row in metrics(tmp_path / "run"))
    assert os.listdir(tmp_path / "run" / "heartbeats") == ["rank-00000.json"]
