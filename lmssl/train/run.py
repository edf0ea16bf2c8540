"""`lmssl train`: from a recipe to a finished run, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmssl import checkpoint
from lmssl.data.batch import dead_loader
from lmssl.errors import LmsslError, Preempted, TrainingError
from lmssl.recipe.load import Loaded, flat
from lmssl.recipe.sections import Recipe
from lmssl.train.console import RunConsole
from lmssl.train.guard import RollBack
from lmssl.train.launch import frozen_objects, num_launched
from lmssl.train.launcher import Launcher
from lmssl.train.lines import closing_line, opening_lines
from lmssl.train.lock import RunLock
from lmssl.train.loop import Loop
from lmssl.train.metrics import MetricsLog
from lmssl.train.opening import open_session
from lmssl.train.phases import Phases
from lmssl.train.session import Session
from lmssl.train.signals import StopFlag, StoppedAtOnce, handling
from lmssl.train.state import TrainState
from lmssl.train.trackers import Trackers
from lmssl.train.watch import Watch, clear


def train(loaded: Loaded, launcher: Launcher | None = None) -> Path:
    """Train a recipe to its last step, continuing by itself in an existing run folder; returns the folder.

    Args:
        launcher: looked after since this process began; None: from here on.
    Raises:
        Preempted: a signal stopped the run after a checkpoint, or before there was anything to save.
        LmsslError: see `open_session` and `Loop.run`.
    """
    recipe, began = loaded.recipe, time.monotonic()
    run = Path(recipe.out_path)
    stop, lock = StopFlag(), RunLock(run)
    early: list[str] = []
    say = early.append  # until there is a console; later windows and loaders report through the same function
    with ExitStack() as stack:
        launcher = stack.enter_context(launcher or Launcher())
        stack.callback(lock.release)
        stack.enter_context(_preempted(run))
        if num_launched() == 1:  # several wait for each other while they open, and a handler would wait with them
            stack.enter_context(handling(stop))
        session = open_session(recipe, lambda text: say(text), lock=lock)
        if num_launched() > 1:
            stack.enter_context(handling(stop))
        accelerator, total = session.accelerator, session.recipe.batches.total_tokens
        console = RunConsole(
            enabled=accelerator.is_main_process, total_tokens=total, first_tokens=session.state.tokens_seen
        )
        stack.enter_context(console)
        say = console.note
        for text in [*early, *opening_lines(session)]:
            say(text)
        phases = Phases(accelerator.device)
        stack.enter_context(_watched(session, phases))
        launcher.then(stop.request)
        config = _tracked_config(session.recipe)
        trackers = Trackers(accelerator, recipe.track.trackers, recipe.name, config, say)
        stack.enter_context(trackers)
        execution = _Execution(recipe, lock, console, phases, stop, trackers, began, session.state.elapsed_seconds)
        session = execution.to_the_end(session)
        for text in (closing_line(session), *session.set_aside.notes()):
            say(text)
    accelerator.end_training()
    return session.run


@dataclass(frozen=True)
class _Execution:
    """What stays the same when a run goes back to an earlier checkpoint."""

    recipe: Recipe
    lock: RunLock
    console: RunConsole
    phases: Phases
    stop: StopFlag
    trackers: Trackers
    began: float
    earlier_seconds: float
    """Of training, before this process."""

    def to_the_end(self, session: Session) -> Session:
        """Run the loop, again from an earlier checkpoint where it decides so; returns the session that ended."""
        rollback: dict[str, Any] | None = None
        while True:
            try:
                self._loop(session, rollback)
                return session
            except RollBack as decision:
                rollback = _roll_back(session, decision)
                rollbacks = [*session.state.rollbacks, rollback]
            del session  # before another is built
            session = open_session(self.recipe, self.console.note, lock=self.lock, rollbacks=rollbacks)

    def _loop(self, session: Session, rollback: dict[str, Any] | None) -> None:
        """One pass through the steps; `rollback`: what led to it."""
        log = None
        try:
            if session.accelerator.is_main_process:
                log = MetricsLog(session.run / "metrics.jsonl", session.state, self.console.note)
                if rollback is not None:
                    log.write({"kind": "guard", "step": session.state.step, "action": "rollback", **rollback})
            loop = Loop(
                session,
                self.console,
                log,
                phases=self.phases,
                stop=self.stop,
                track=self.trackers.log,
                elapsed_seconds=lambda: self.earlier_seconds + time.monotonic() - self.began,
            )
            session.saver.progress = self.phases.saved_file
            with frozen_objects():
                loop.run()
        except Preempted:  # by all ranks; after any other error, ranks that waited for each other would hang
            session.backend.close()
            raise
        finally:
            if log is not None:
                log.close()
            session.saver.close()
        session.backend.close()


def _roll_back(session: Session, decision: RollBack) -> dict[str, Any]:
    """Remove the checkpoints since the last good one, and say what is given up; every rank must call."""
    session.saver.wait()
    good = 0
    for path in reversed(checkpoint.step_folders(session.run)):
        if checkpoint.validate(path) is None:
            found = checkpoint.Checkpoint(path, int(path.name.removeprefix("step-")))
            if TrainState.from_json(found.text("state.json")).consecutive_skips == 0:
                good = found.step
                break
    session.accelerator.wait_for_everyone()  # before the main process removes what others still look at
    session.saver.go_back(good)
    session.backend.close()
    first, end = decision.skip
    session.report(
        f"{decision.reason}: going back from step {decision.from_step} to step {good}, and leaving out positions "
        f"{first} to {end - 1}"
    )
    about = {"rollback": len(session.state.rollbacks) + 1, "from_step": decision.from_step, "to_step": good}
    return about | {"skip": [first, end], "reason": decision.reason}


@contextmanager
def _preempted(run: Path) -> Iterator[None]:
    """A signal that comes before there is anything to save stops the run like any other."""
    try:
        yield
    except StoppedAtOnce:
        raise Preempted(
            "stopped by a signal before this session's first step was done; there is nothing new to save",
            where=str(run),
            remedy="run the same command to continue",
        ) from None


@contextmanager
def _watched(session: Session, phases: Phases) -> Iterator[None]:
    """Watches over this rank and the others, and tells them when this one fails."""
    accelerator = session.accelerator
    rank, num_ranks, folder = accelerator.process_index, accelerator.num_processes, session.run / "heartbeats"
    watch = Watch(
        folder,
        phases,
        rank=rank,
        num_ranks=num_ranks,
        hang_seconds=session.recipe.train.hang_seconds,
    )
    if accelerator.is_main_process:
        clear(folder, num_ranks)
    accelerator.wait_for_everyone()
    watch.prepare()
    accelerator.wait_for_everyone()
    watch.start()
    try:
        yield
    except Preempted:
        accelerator.end_training()  # all ranks agreed to leave, so all come here
        raise
    except BaseException as error:
        explained = _explained(error, watch, session)
        watch.fail(explained.what if isinstance(explained, LmsslError) else f"{type(error).__name__}: {error}")
        if explained is error:
            raise
        raise explained from error
    finally:
        watch.close()


def _explained(error: BaseException, watch: Watch, session: Session) -> BaseException:
    """What a person should read: that another rank failed first, or that memory ran out; else the error itself."""
    if _is_out_of_memory(error):
        train, batches = session.recipe.train, session.recipe.batches
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return TrainingError(
            f"out of memory in step {session.state.step + 1}, with micro-batches of {train.micro_batch_sequences} x "
            f"{batches.sequence_length(session.state.step)} tokens: {said}",
            where="train.micro_batch_sequences",
            remedy="lower train.micro_batch_sequences, which changes no result, turn on train.activation_checkpointing "
            "or spread the model over devices (recipes/launch/fsdp2.yaml); earlier checkpoints are intact",
        )
    loader = dead_loader(error)
    if loader is not None:
        return loader
    collective = isinstance(error, LmsslError) and isinstance(error.__cause__, OSError)
    if not isinstance(error, Exception) or (isinstance(error, LmsslError) and not collective):
        return error
    elsewhere = watch.failure_elsewhere()
    if elsewhere is None:
        return error
    return TrainingError(
        f"{elsewhere}; this rank stops with it",
        where=str(session.run),
        remedy="see what that rank says; run the same command to continue from the last checkpoint",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's own words on CPU


def _tracked_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: flat, and only of plain values."""
    return {path: v if isinstance(v, (bool, int, float, str)) else str(v) for path, v in flat(recipe).items()}
