"""Signals in every phase, to real processes: what is saved, what the exit status is, who is left."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import FaultyRun, faulty_run, interrupt
from lmssl import checkpoint
from runs import metrics, small_recipe, tensors_of, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def recipe_of(tmp_path: Path, text_folder: Path, name: str = "run", **changes: Any) -> Path:
    """Four micro-batches a step for one process, two for each of two."""
    sizes = {f"model.{key}": value for key, value in SIZES.items()}
    few = {"train.micro_batch_sequences": 4, "train.precision": "fp32", "data.validation.tokens": 800}
    recipe = small_recipe(text_folder, tmp_path / name, tmp_path / "cache", steps=6, **sizes, **few, **changes)
    return write_recipe(tmp_path / f"{name}.yaml", recipe)


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in metrics(run)]


def assert_equal(first: Path, second: Path) -> None:
    a, b = (checkpoint.find_step(run, None) for run in (first, second))
    for group in ("model", "optim"):
        ours, theirs = tensors_of(a, group), tensors_of(b, group)
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert json.loads(a.text("state.json")) == json.loads(b.text("state.json"))
    assert without_clock(first) == without_clock(second)


def assert_preempted(run: FaultyRun, began: float) -> None:
    """In the time that schedulers give."""
    assert run.end() == 75, run.output
    assert time.monotonic() - began < SECONDS_TO_END


SECONDS_TO_END = 25
IN_THE_THIRD_STEP = "on_sums(lambda n, training: at('micro') if training and n == 10 else None)"
IN_A_WAIT_FOR_DATA = """
from lmssl.train.session import Session
batches = Session.batches
def waiting(self):
    for n, micro_batches in enumerate(batches(self)):
        if n == 2:
            at("micro")
        yield micro_batches
Session.batches = waiting
"""


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        *((how, IN_THE_THIRD_STEP) for how in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        (signal.SIGINT, IN_A_WAIT_FOR_DATA),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT", "SIGINT in a wait for data"],
)
def test_a_signal_in_a_step_drops_it_and_saves_the_last_one(
    tmp_path: Path, text_folder: Path, how: signal.Signals, fault: str
) -> None:
    """Twice for SIGTERM, as schedulers do; the third step is in its second of four micro-batches."""
    recipe = recipe_of(tmp_path, text_folder)
    with faulty_run(tmp_path, recipe, fault) as run:
        pid, began = run.reached("micro"), time.monotonic()
        interrupt(pid, how)
        if how == signal.SIGTERM:
            interrupt(pid, how)
        if fault == IN_THE_THIRD_STEP:  # the wait is ended by the signal
            run.go("micro")
        assert_preempted(run, began)
        assert "stopped by a signal after step 2" in run.output
        assert "Traceback" not in run.output
    assert checkpoint.find_step(tmp_path / "run", None).step == 2
    if how == signal.SIGTERM:
        with faulty_run(tmp_path, recipe) as run:
            assert run.end() == 0, run.output
        with faulty_run(tmp_path, recipe_of(tmp_path, text_folder, "whole")) as run:
            assert run.end() == 0, run.output
        assert_equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_an_evaluation_is_heard_and_the_evaluation_is_made_again(
    tmp_path: Path, text_folder: Path, how: signal.Signals
) -> None:
    change = {"evaluate.every_steps": 2}
    fault = """
trained = []
def act(n, training):
    if training:
        trained.append(n)
    elif len(trained) == 8:
        trained.append(n)
        at("evaluation")
on_sums(act)
"""
    recipe = recipe_of(tmp_path, text_folder, **change)
    with faulty_run(tmp_path, recipe, fault) as run:
        pid, began = run.reached("evaluation"), time.monotonic()
        interrupt(pid, how)
        run.go("evaluation")
        assert_preempted(run, began)
    found = checkpoint.find_step(tmp_path / "run", None)
    assert found.step == 2
    assert json.loads(found.text("state.json"))["evaluation"]["step"] == 0
    if how == signal.SIGINT:  # what follows is the same
        return
    with faulty_run(tmp_path, recipe) as run:
        assert run.end() == 0, run.output
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder, "whole", **change)) as run:
        assert run.end() == 0, run.output
    assert_equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("asynchronous", "how"), [(True, signal.SIGTERM), (False, signal.SIGINT)])
def test_a_signal_in_a_save_leaves_one_valid_checkpoint(
    tmp_path: Path, text_folder: Path, asynchronous: bool, how: signal.Signals
) -> None:
    fault = """
from lmssl.checkpoint import protocol
write = protocol.write_tensors
def slow(path, named):
    if "00000002" in str(path) and "model" in path.name:
        at("save")
    return write(path, named)
protocol.write_tensors = slow
"""
    recipe = recipe_of(tmp_path, text_folder, **{"checkpoint.every_steps": 2, "checkpoint.asynchronous": asynchronous})
    with faulty_run(tmp_path, recipe, fault) as run:
        pid, began = run.reached("save"), time.monotonic()
        interrupt(pid, how)
        interrupt(pid, how)
        run.go("save")
        assert_preempted(run, began)
    found = checkpoint.find_step(tmp_path / "run", None)
    assert found.step in ((2, 3) if asynchronous else (2,))
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [checkpoint.validate(tmp_path / "run" / "checkpoints" / name) for name in folders] == [None] * len(folders)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_nothing(
    tmp_path: Path, text_folder: Path, how: signal.Signals, code: int
) -> None:
    fault = """
from lmssl.train import opening
build = opening.build_recipe_model
def slow(*args, **kwargs):
    at("building")
    return build(*args, **kwargs)
opening.build_recipe_model = slow
"""
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault) as run:
        interrupt(run.reached("building"), how)
        assert run.end() == code, run.output
        assert "Traceback" not in run.output
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_ends_the_run_at_once(tmp_path: Path, text_folder: Path) -> None:
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), IN_THE_THIRD_STEP) as run:
        pid = run.reached("micro")
        interrupt(pid, signal.SIGINT)
        time.sleep(0.5)  # a person, and no launcher that forwards the same key
        interrupt(pid, signal.SIGINT)
        assert run.end() == 130, run.output
        assert "Traceback" not in run.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_first_interrupt_while_compiling_ends_at_once(tmp_path: Path, text_folder: Path) -> None:
    """With a loader process, which must not be left either."""
    fault = "on_sums(lambda n, training: at('micro') if training and n == 1 else None)"
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder, **{"data.workers": 1}), fault) as run:
        interrupt(run.reached("micro"), signal.SIGINT)
        assert run.end() == 130, run.output
        assert "Traceback" not in run.output


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_when_the_launcher_is_asked_to(
    tmp_path: Path, text_folder: Path, how: signal.Signals
) -> None:
    """Rank 0 is held in the third step's second micro-batch, rank 1 waits for it in the exchange of gradients.

    SIGINT goes to the whole group, as a terminal sends it.
    """
    fault = "on_sums(lambda n, training: at('micro') if training and n == 6 and RANK == 0 else None)"
    recipe = recipe_of(tmp_path, text_folder)
    with faulty_run(tmp_path, recipe, fault, launcher="torchrun") as run:
        run.reached("micro")
        began = time.monotonic()
        if how == signal.SIGTERM:
            interrupt(run.process.pid, how)
        else:
            os.killpg(run.process.pid, how)
        time.sleep(1.0)
        run.go("micro")
        assert run.end() != 0, run.output
        assert time.monotonic() - began < SECONDS_TO_END
        assert run.output.count("stopped by a signal after step") == 2, run.output
    assert checkpoint.find_step(tmp_path / "run", None).step in (2, 3)
    if how == signal.SIGINT:
        return
    with faulty_run(tmp_path, recipe, launcher="torchrun") as run:
        assert run.end() == 0, run.output
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder, "whole"), launcher="torchrun") as run:
        assert run.end() == 0, run.output
    assert_equal(tmp_path / "whole", tmp_path / "run")


def test_one_rank_that_is_asked_stops_all(tmp_path: Path, text_folder: Path) -> None:
    fault = "on_sums(lambda n, training: at('micro') if training and n == 5 and RANK == 1 else None)"
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault, launcher="torchrun") as run:
        interrupt(run.reached("micro", rank=1), signal.SIGUSR1)
        run.go("micro")
        assert run.end() != 0, run.output
        assert run.output.count("stopped by a signal after step 3") == 2  # asked for in one call, known in the next
    assert checkpoint.find_step(tmp_path / "run", None).step == 3


def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path: Path, text_folder: Path) -> None:
    fault = "on_sums(lambda n, training: at('micro') if training and n == 5 else None)"
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault, launcher="torchrun") as run:
        run.reached("micro", rank=0)
        run.reached("micro", rank=1)
        run.process.kill()
        run.process.wait()
        time.sleep(3.0)  # the watch looks every second
        run.go("micro")
        assert run.end() != 0
        assert "stopped by a signal after step" in run.output
    assert checkpoint.find_step(tmp_path / "run", None).step >= 2


def test_ranks_whose_launcher_dies_while_they_start_end(tmp_path: Path, text_folder: Path) -> None:
    """They are in sessions of their own, so what kills the launcher does not reach them."""
    fault = "import lmssl.train.opening as o\nopened = o.load_tokenizer\ndef late(path):\n    at('start')\n"
    fault += "    time.sleep(1000)\no.load_tokenizer = late\n"
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault, launcher="torchrun") as run:
        run.reached("start", rank=0)
        run.reached("start", rank=1)
        run.process.kill()
        run.go("start")
        assert run.end() != 0
        assert run.output.count("the launcher is gone") == 2, run.output
    assert not (tmp_path / "run").exists()
