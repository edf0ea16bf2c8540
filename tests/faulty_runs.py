"""Runs as processes of their own, with a fault in them: a script changes a function of lmssl, then calls its `main`."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PATIENCE_SECONDS = 240
"""On a machine that does ten other things; every wait ends when its condition holds."""

# What faults are made of. `at` leaves a mark that a test waits for, and waits for the test's answer.
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
FOLDER = Path({folder!r})
RANK = int(os.environ.get("RANK", "0"))
def at(name):
    (FOLDER / f"{{name}}-{{RANK}}").write_text(str(os.getpid()))
    while not (FOLDER / f"go-{{name}}").exists():
        time.sleep(0.02)
def on_sums(act):
    # act(number of the call, whether gradients are taken) before each forward of the causal objective, and what it
    # returns is multiplied to the loss
    from lmssl.objective.causal import CausalObjective
    import torch
    sums, calls = CausalObjective.sums, [0, 0]
    def faulty(self, model, inputs):
        training = torch.is_grad_enabled()
        calls[training] += 1
        factor = act(calls[training], training)
        found = sums(self, model, inputs)
        return found if factor is None else {{k: v * factor for k, v in found.items()}}
    CausalObjective.sums = faulty
"""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


class FaultyRun:
    """One launch of `lmssl train` with a fault."""

    def __init__(
        self,
        folder: Path,
        recipe: Path,
        fault: str = "",
        *,
        launcher: str | None = None,
        through: Sequence[str] = (),
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """Args: `through`: a command that runs the command after it; `stdout`, `stderr`: instead of `output`."""
        self.folder = folder
        for old in folder.glob("go-*"):
            old.unlink()
        script = folder / "faulty.py"
        end = "\nif __name__ == '__main__':\n    from lmssl.cli import main\n    sys.exit(main(sys.argv[1:]))\n"
        script.write_text(PREAMBLE.format(folder=str(folder)) + fault + end, encoding="utf-8")
        start = [] if launcher is None else [*LAUNCHERS[launcher]]
        if launcher == "accelerate":
            start.append(str(free_port()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
        if launcher is not None:
            environment["ACCELERATE_USE_CPU"] = "true"
        self._out = (folder / "output").open("wb")
        self.process = subprocess.Popen(
            [*through, sys.executable, *start, str(script), "train", str(recipe)],
            stdout=self._out if stdout is None else stdout,
            stderr=self._out if stderr is None else stderr,
            env=environment,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What was printed so far."""
        return (self.folder / "output").read_text(encoding="utf-8", errors="replace")

    def reached(self, name: str, rank: int = 0) -> int:
        """Wait for a mark; returns the process that left it."""
        path = self.folder / f"{name}-{rank}"
        wait(lambda: self.process.poll() is not None or (path.exists() and path.read_text() != ""))
        assert path.exists(), f"the run ended with {self.process.poll()} before {name}:\n{self.output}"
        return int(path.read_text())

    def go(self, name: str) -> None:
        """Let the process that waits at a mark go on."""
        (self.folder / f"go-{name}").touch()

    def end(self) -> int:
        """Wait for the end; returns the exit status. No process of it may be left."""
        try:
            code = self.process.wait(PATIENCE_SECONDS)
        finally:
            self._out.close()
        wait(lambda: not self.left(), seconds=60)
        return code

    def left(self) -> list[psutil.Process]:
        """Processes that the run started and that are still there."""
        mark, found = str(self.folder), []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and any(mark in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """End what is left, after a test that failed."""
        for process in self.left():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(30)
        self._out.close()


@contextmanager
def bad_text(positions: Collection[int], factor: float = math.nan) -> Iterator[None]:
    """The loss of a micro-batch that holds one of these positions is no number, or so often itself, in this process."""
    import torch

    from lmssl.objective.causal import CausalObjective

    prepare, sums = CausalObjective.prepare, CausalObjective.sums

    def marked(self: CausalObjective, batch: Any, *, evaluation: bool = False) -> Any:
        micro = prepare(self, batch, evaluation=evaluation)
        bad = not evaluation and not set(positions).isdisjoint(batch.positions_B.tolist())
        micro.inputs["factor"] = torch.tensor(factor if bad else 1.0)
        return micro

    def faulty(self: CausalObjective, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value * inputs["factor"] for name, value in sums(self, model, inputs).items()}

    if positions:
        CausalObjective.prepare, CausalObjective.sums = marked, faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        CausalObjective.prepare, CausalObjective.sums = prepare, sums  # type: ignore[method-assign]


@contextmanager
def faulty_run(folder: Path, recipe: Path, fault: str = "", **how: Any) -> Iterator[FaultyRun]:
    """A run that is ended whatever happens; `how` as `FaultyRun` has it."""
    run = FaultyRun(folder, recipe, fault, **how)
    try:
        yield run
    finally:
        run.close()


def own_mounts(script: str = 'exec "$@"', *arguments: str) -> list[str]:
    """What runs the command after it where mounts are its own and gone at its end.

    Args:
        script: of the shell, which has `arguments`, then the command in `"$@"`.
    """
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    return [*namespace, "sh", "-c", script, "sh", *arguments]


def wait(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody uses now."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def interrupt(pid: int, how: signal.Signals) -> None:
    """Send a signal to one process."""
    os.kill(pid, how)
