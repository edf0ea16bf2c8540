"""`lmssl train`: from a recipe to a finished run, top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lmssl.data.order import kept_position
from lmssl.errors import Preempted, TrainingError
from lmssl.evaluate.loss import LossResult
from lmssl.optim.schedule import lr_ratio
from lmssl.recipe.load import Loaded, flat
from lmssl.recipe.sections import Recipe
from lmssl.train.console import RunConsole
from lmssl.train.metrics import MetricsLog, add_measured, interval_metrics
from lmssl.train.session import Session, open_session
from lmssl.train.state import Interval
from lmssl.train.step import Measured, train_step


class StopFlag:
    """Set by SIGINT and SIGTERM; the loop reads it between steps. A second SIGINT interrupts at once."""

    requested = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def train(loaded: Loaded) -> Path:
    """Train a recipe to its last step, continuing by itself in an existing run folder; returns the folder.

    Raises:
        Preempted: a signal stopped the run after a checkpoint.
        LmsslError: see `open_session`.
    """
    recipe = loaded.recipe
    early: list[str] = []
    say = early.append  # until there is a console; later windows and loaders report through the same function
    session = open_session(recipe, lambda text: say(text))
    main = session.accelerator.is_main_process
    total = recipe.batches.total_tokens
    session.accelerator.init_trackers(recipe.name, config=_tracked_config(recipe))
    with RunConsole(enabled=main, total_tokens=total, first_tokens=session.state.tokens_seen) as console:
        say = console.note
        for text in [*early, *opening_lines(session)]:
            say(text)
        log = MetricsLog(session.run / "metrics.jsonl", step=session.state.step) if main else None
        try:
            with stop_flag() as stop:
                _loop(session, console, log, stop)
            for text in (closing_line(session), *session.set_aside.notes()):
                console.note(text)
        finally:
            if log is not None:
                log.close()
            session.accelerator.end_training()
    return session.run


def _tracked_config(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe as trackers take it: flat, and only of plain values."""
    if not recipe.track.trackers:
        return None
    return {path: v if isinstance(v, (bool, int, float, str)) else str(v) for path, v in flat(recipe).items()}


def _loop(session: Session, console: RunConsole, log: MetricsLog | None, stop: StopFlag) -> None:
    """Steps from the state's to the recipe's last; log, evaluate and save in this order after each."""
    recipe, state, plan = session.recipe, session.state, session.recipe.batches
    if state.step == 0 and recipe.steps:
        _evaluate(session, console, log)
    clock = Clock(state.tokens_seen)
    batches = session.batches()
    pending: list[Measured] = []
    try:
        while state.step < recipe.steps:
            with clock.waiting():
                micro_batches = next(batches)
            session.begin_step(micro_batches[0])
            lr = _learning_rate(recipe, state.tokens_seen)
            measured = train_step(
                session.module,
                session.optimizer,
                session.objective,
                micro_batches,
                session.accelerator,
                average=session.average,
                lr=lr,
                max_grad_norm=recipe.optim.max_grad_norm,
                seed=recipe.seed,
                step=state.step,
                stop_requested=stop.requested,
            )
            pending.append(measured)
            state.step += 1
            state.tokens_seen = plan.tokens_before(state.step)
            state.cursor = kept_position(plan.first_position(state.step), recipe.data.skip)
            last = state.step == recipe.steps
            log_due = last or _due(state.step, recipe.train.log_every_steps)
            evaluate_due = last or _due(state.step, recipe.evaluate.every_steps)
            save_due = last or _due(state.step, recipe.checkpoint.every_steps)
            # The device is read one step late, so that it never waits for the host; before a line or a save, at once.
            stopping = _read(session, pending, keep=0 if log_due or evaluate_due or save_due else 1)
            if stopping:
                _read(session, pending, keep=0)
            if log_due:
                _log(session, console, log, clock, lr, float(measured.grad_norm.item()))
            if evaluate_due:
                _evaluate(session, console, log)
                clock.restart(state.tokens_seen)
            if evaluate_due or save_due or stopping:
                session.list_set_aside()
            if save_due or stopping:
                session.save()
                clock.restart(state.tokens_seen)
            if stopping and not last:
                raise Preempted(
                    f"stopped by a signal after step {state.step}; everything up to it is saved",
                    where=str(session.run),
                    remedy="run the same command to continue",
                )
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        session.list_set_aside()


def _learning_rate(recipe: Recipe, tokens_seen: int) -> float:
    return recipe.optim.lr * lr_ratio(recipe.schedule, tokens_seen=tokens_seen, total_tokens=recipe.train.tokens)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _read(session: Session, pending: list[Measured], *, keep: int) -> bool:
    """Read all but the newest `keep` measured steps; returns whether a rank was asked to stop.

    Raises:
        TrainingError: too many updates in a row were not finite.
    """
    recipe, state = session.recipe, session.state
    stopping = False
    while len(pending) > keep:
        step = state.step - len(pending) + 1
        measured = pending.pop(0)
        stopping |= int(measured.stop.item()) > 0
        finite = add_measured(state.interval, measured)
        state.consecutive_skips = 0 if finite else state.consecutive_skips + 1
        if finite:
            continue
        state.skipped_steps += 1
        ends = recipe.batches.first_position(step - 1), recipe.batches.first_position(step) - 1
        first, last = (kept_position(k, recipe.data.skip) for k in ends)
        positions = f"positions {first} to {last}"
        session.report(f"step {step} skipped: its loss or gradient is not finite; {positions}")
        if state.consecutive_skips > recipe.train.max_skipped_steps:
            raise TrainingError(
                f"{state.consecutive_skips} steps in a row had a loss or gradient that is not finite",
                where=f"step {step}, {positions}",
                remedy="lower optim.lr, lengthen schedule.warmup_tokens, or use fp32; earlier checkpoints are intact",
            )
    return stopping


def _log(
    session: Session, console: RunConsole, log: MetricsLog | None, clock: Clock, lr: float, grad_norm: float
) -> None:
    """One line of metrics from the interval's sums; clock fields stand apart, for they differ between equal runs."""
    recipe, state = session.recipe, session.state
    row: dict[str, Any] = {"kind": "train", "step": state.step, "tokens": state.tokens_seen}
    knows_bytes = all(corpus.kind != "tokens" for corpus in recipe.data.mixture)
    row |= interval_metrics(
        state.interval,
        num_tokens=state.tokens_seen - recipe.batches.tokens_before(state.step - state.interval.num_steps),
        knows_bytes=knows_bytes,
        metrics=getattr(session.objective, "metrics", ()),
    )
    row |= {"lr": lr, "grad_norm": grad_norm if math.isfinite(grad_norm) else None}
    row |= {"skipped_steps": state.skipped_steps, "next_position": state.cursor, "time": clock.read(state.tokens_seen)}
    state.interval = Interval()
    rate = row["time"]["tokens_per_second"]
    left = recipe.batches.total_tokens - state.tokens_seen
    console.advance(row, left / rate if rate else None)
    if log is not None:
        row["epochs"] = session.stream.epochs_at(state.cursor)
        log.write(row)
    _track(session, row)


def _evaluate(session: Session, console: RunConsole, log: MetricsLog | None) -> None:
    started = time.monotonic()
    results = session.evaluate()
    if results is None:
        return
    state = session.state
    row: dict[str, Any] = {"kind": "evaluate", "step": state.step, "tokens": state.tokens_seen}
    row |= _evaluation_row(results, {split.corpus for split in session.stream.validation_sets()})
    state.evaluation = {"step": state.step, "loss": row["loss"], "bits_per_byte": row["bits_per_byte"]}
    if "sets" in row:
        state.evaluation["sets"] = row["sets"]
    row["time"] = {"seconds": time.monotonic() - started}
    bits = "" if row["bits_per_byte"] is None else f"  bits/byte {row['bits_per_byte']:.3f}"
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    console.note(f"validation at step {state.step}: loss {loss}{bits}  ({row['num_targets']:,} targets)")
    if log is not None:
        log.write(row)
    _track(session, {f"validation_{k}": v for k, v in row.items()} | {"step": state.step})


def _evaluation_row(results: dict[str, LossResult], sets: Collection[str]) -> dict[str, Any]:
    whole = results[""]
    row: dict[str, Any] = {"loss": whole.loss, "bits_per_byte": whole.bits_per_byte, "num_targets": whole.num_targets}
    row |= whole.further
    by_name = {
        name: {"loss": r.loss, "bits_per_byte": r.bits_per_byte, **r.further} for name, r in results.items() if name
    }
    row["corpora"] = {name: numbers for name, numbers in by_name.items() if name not in sets}
    if sets:
        row["sets"] = {name: numbers for name, numbers in by_name.items() if name in sets}
    return row


def _track(session: Session, row: dict[str, Any]) -> None:
    """Hand numbers to the trackers; a tracker that fails must not stop training."""
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
    if not session.recipe.track.trackers:
        return
    try:
        session.accelerator.log(numbers, step=row["step"])
    except Exception as error:
        session.report(f"tracker failed, training goes on: {error}")


def opening_lines(session: Session) -> list[str]:
    """What a person wants to know before the first step."""
    recipe, accelerator = session.recipe, session.accelerator
    num_parameters = sum(p.numel() for p in session.core.parameters())
    name = type(session.core.model).__name__
    processes = f" x {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    sizes = [f"{recipe.batches.num_tokens(step):,}" for step in (0, max(0, recipe.steps - 1))]
    where = f"{accelerator.device.type}{processes}, {recipe.train.precision}, compile {session.compiled}"
    return [
        f"{recipe.name}: {name}, {num_parameters:,} parameters on {where}",
        f"{recipe.steps:,} steps of {' to '.join(dict.fromkeys(sizes))} tokens; run folder {session.run}",
    ]


def closing_line(session: Session) -> str:
    """What was read, how often each corpus, and what of it was padding, cut or unreadable."""
    totals = session.stream.totals(session.state.cursor)
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in session.stream.epochs_at(session.state.cursor).items())
    return (
        f"opened {totals.num_documents:,} documents, {totals.num_tokens:,} tokens; padding {totals.padding_ratio:.2%}, "
        f"{totals.num_cut_documents:,} cut documents, {totals.num_bad_records:,} bad records, "
        f"{session.state.skipped_steps:,} skipped steps; epochs: {epochs}"
    )


class Clock:
    """Seconds, tokens per second and waiting for data since the last line."""

    def __init__(self, tokens: int) -> None:
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Begin a new interval, leaving out what lay before."""
        self._started, self._tokens, self._waited = time.monotonic(), tokens, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def read(self, tokens: int) -> dict[str, float]:
        """Numbers since the last reading, then restart."""
        seconds = max(1e-9, time.monotonic() - self._started)
        row = {
            "seconds": seconds,
            "tokens_per_second": (tokens - self._tokens) / seconds,
            "data_wait_ratio": self._waited / seconds,
        }
        self.restart(tokens)
        return row


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Handles SIGINT and SIGTERM for the duration of the loop."""
    flag = StopFlag()
    previous = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
