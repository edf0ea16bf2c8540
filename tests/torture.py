"""A run killed at random moments and started again until it is done equals the one that nobody touched.

::

    python tests/torture.py --kills 20 --seed 1 --processes 2

Kills fall while the run starts, between steps, and while a checkpoint is written; most are SIGKILL to every process,
some are SIGTERM. Compared bit for bit: weights, optimiser, averages, state, ledger, metrics (each step once) and the
positions that were read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runs import assert_equal_runs, metrics, small_recipe, write_recipe

STEPS_PER_KILL = 20
"""Steps of the run per kill: enough that it cannot be done before the last."""
SECONDS_PER_START = 300.0
"""A start that takes longer hangs."""


def main() -> None:
    """Run both and compare; exits with 1 and the difference if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="keep everything here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        counts = torture(folder, kills=options.kills, seed=options.seed, processes=options.processes)
    print(f"equal after {options.kills} interruptions: " + ", ".join(f"{n} {how}" for how, n in counts.items()))


def torture(folder: Path, *, kills: int, seed: int, processes: int = 1) -> dict[str, int]:
    """Train twice in a folder, once in peace; returns how often each kind of interruption happened.

    Raises:
        AssertionError: the runs differ, or a start failed by itself.
    """
    text = folder / "text"
    text.mkdir()
    words = random.Random(7)
    for number in range(6):
        paragraphs = (" ".join(_word(words) for _ in range(words.randrange(5, 120))) for _ in range(80))
        (text / f"{number}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    recipes = {}
    for name in ("whole", "killed"):
        recipe = small_recipe(
            text,
            folder / name,
            folder / f"cache-{name}",
            steps=STEPS_PER_KILL * kills + 10,
            **{
                "checkpoint.every_steps": 4,
                "evaluate.every_steps": 10,
                "train.log_every_steps": 1,
                "train.ema_decay": 0.99,
                "model": {
                    "kind": "gpt2",
                    "n_embd": 32,
                    "n_layer": 2,
                    "n_head": 2,
                    "resid_pdrop": 0.1,
                    "embd_pdrop": 0.0,
                    "attn_pdrop": 0.0,
                },
                "data.sequence_length": 32,
                "train.tokens": 512 * (STEPS_PER_KILL * kills + 10),
                "train.batch_tokens": 512,
            },
        )
        recipes[name] = write_recipe(folder / f"{name}.yaml", recipe)
    finish(recipes["whole"], processes)
    counts: dict[str, int] = {}
    draw = random.Random(seed)
    for _ in range(kills):
        how = interrupt(recipes["killed"], folder / "killed", draw, processes)
        counts[how] = counts.get(how, 0) + 1
    finish(recipes["killed"], processes)
    assert_equal_runs(folder / "whole", folder / "killed")
    steps = [row["step"] for row in metrics(folder / "killed") if row["kind"] == "train"]
    assert steps == list(range(1, STEPS_PER_KILL * kills + 11))
    return counts


def interrupt(recipe: Path, run: Path, draw: random.Random, processes: int) -> str:
    """Start the run and end it by a signal at a drawn moment; returns which and when, as words."""
    moment = draw.choice(("starting", "training", "training", "saving"))
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    waits: dict[str, Callable[[], Iterator[None]]] = {
        "starting": lambda: _seconds(draw.uniform(0.0, 8.0)),
        "training": lambda: _new_steps(run, draw.randrange(1, STEPS_PER_KILL)),
        "saving": lambda: _a_save(run),
    }
    process = start(recipe, processes)
    try:
        for _ in waits[moment]():
            assert process.poll() is None, f"the run ended by itself with {process.returncode}: {_errors(process)}"
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.03))
        assert process.poll() is None, f"the run ended by itself with {process.returncode}: {_errors(process)}"
    finally:
        os.killpg(process.pid, number)
        try:
            process.communicate(timeout=SECONDS_PER_START)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if number == signal.SIGTERM and moment != "starting" and processes == 1:
        assert process.returncode == 75, f"after SIGTERM the run ended with {process.returncode}"
    return f"{signal.Signals(number).name} while {moment}"


def start(recipe: Path, processes: int) -> subprocess.Popen[str]:
    """The run in a process group of its own, under torchrun if it has several processes."""
    launcher: list[str] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", _free_port()]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "lmssl", "train", str(recipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
    )


def finish(recipe: Path, processes: int) -> None:
    """Run to the end."""
    process = start(recipe, processes)
    _, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr


def _seconds(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def _new_steps(run: Path, count: int) -> Iterator[None]:
    """Until so many steps are done since this start."""
    yield from _opened(run)
    first = _sessions(run)[-1]["from_step"]
    yield from _until(lambda: _last_step(run) >= first + count, f"step {first + count}")


def _a_save(run: Path) -> Iterator[None]:
    """Until a file of a checkpoint is being written, by this start or an earlier one that was killed there."""
    yield from _opened(run)
    yield from _until(lambda: any((run / "checkpoints").glob(".tmp-step-*/*")), "a save")


def _opened(run: Path) -> Iterator[None]:
    before = len(_sessions(run))
    yield from _until(lambda: len(_sessions(run)) > before, "the run's first step")


def _sessions(run: Path) -> list[dict[str, Any]]:
    path = run / "sessions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def _until(reached: Callable[[], bool], what: str) -> Iterator[None]:
    end = time.monotonic() + SECONDS_PER_START
    while not reached():
        assert time.monotonic() < end, f"{what} did not come within {SECONDS_PER_START:.0f} s"
        yield


def _last_step(run: Path) -> int:
    rows: list[dict[str, Any]] = metrics(run)
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def _errors(process: subprocess.Popen[str]) -> str:
    return process.communicate()[1]


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("aeinorstl") for _ in range(draw.randrange(2, 9)))


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    main()
