"""The steps of a run from its state's to its last: read, update, judge, log, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from lmssl.checkpoint import Saved
from lmssl.data.order import kept_position
from lmssl.errors import EvaluationError, Preempted, TrainingError
from lmssl.evaluate.loss import LossResult
from lmssl.evaluate.results import FILE as EVALUATIONS
from lmssl.evaluate.results import append_rows
from lmssl.objective.base import MicroBatch
from lmssl.optim.schedule import lr_ratio, momentum_at, spent_ratio
from lmssl.train import phases as named
from lmssl.train.agree import Agreement
from lmssl.train.console import RunConsole
from lmssl.train.guard import Limits, RollBack, limits
from lmssl.train.lines import answer_lines, answer_row, evaluation_line, evaluation_row, tracked_answer
from lmssl.train.metrics import MetricsLog, add_measured, interval_metrics
from lmssl.train.phases import Phases
from lmssl.train.session import Session
from lmssl.train.signals import StopFlag, StoppedAtOnce
from lmssl.train.state import Interval
from lmssl.train.step import Measured, train_step
from lmssl.train.telemetry import Telemetry

Row = dict[str, Any]


@dataclass(frozen=True)
class _Pending:
    """A step that the host has not read yet."""

    step: int
    """From 0."""
    measured: Measured
    limits: Limits


class Loop:
    """One pass of a session through its steps."""

    def __init__(
        self,
        session: Session,
        console: RunConsole,
        log: MetricsLog | None,
        *,
        phases: Phases,
        stop: StopFlag,
        track: Callable[[Row], None],
        elapsed_seconds: Callable[[], float],
    ) -> None:
        """Args: `log`: on the main process; `elapsed_seconds`: of training, earlier sessions included."""
        accelerator = session.accelerator
        self.session, self.console, self.log, self.phases, self.stop = session, console, log, phases, stop
        self._track = track
        self._agreement = Agreement(
            lambda: stop.requested or session.saver.failed,  # a save then raises on all ranks
            elapsed_seconds,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            seconds=session.state.elapsed_seconds,
        )
        self._telemetry = Telemetry(
            session.recipe,
            phases,
            accelerator.device,
            num_ranks=accelerator.num_processes,
            vocab_size=session.core.model.config.get_text_config().vocab_size,
            step=session.state.step,
        )
        self._pending: list[_Pending] = []
        self._saved_step = session.state.step
        self._saved: list[Saved] = []
        self._lr = 0.0
        self._num_evaluated = 0
        """Micro-batches of the present evaluation."""
        self._ended = self._is_over()
        """Whether the step that was made last is the run's last."""

    def run(self) -> None:
        """Make every step that is left, and save the last.

        Raises:
            Preempted: a rank was asked to stop; the last completed step is saved.
            RollBack: too many steps in a row could not be made.
            TrainingError: so it is, and the run has gone back as often as it may.
            CheckpointError: a checkpoint could not be saved.
        """
        session, state = self.session, self.session.state
        self.phases.step = state.step
        self._evaluate_what_was_left()
        batches = session.batches()
        micro_batches: list[MicroBatch] = []
        try:
            while not self._ended:
                micro_batches = self._next(batches, micro_batches)
                if not self._step(micro_batches):
                    self._leave()
                self._after_step()
                self.phases.enter(named.LOOP)
            self._agreement.close()
        except RollBack:
            self._agreement.close()
            raise
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
            session.list_set_aside()

    def _next(self, batches: Iterator[list[MicroBatch]], previous: list[MicroBatch]) -> list[MicroBatch]:
        """The step's micro-batches; where a signal ends the wait, the last ones, for the step will be dropped."""
        self.phases.enter(named.DATA)
        try:
            with self.stop.interrupting(enabled=bool(previous)):
                return next(batches)
        except StoppedAtOnce:
            if not previous:
                raise
            return previous

    def _step(self, micro_batches: list[MicroBatch]) -> bool:
        """Make a step; False: the ranks agreed to stop instead."""
        session, state = self.session, self.session.state
        recipe, plan = session.recipe, session.recipe.batches
        self.phases.enter(named.COMPUTE)
        session.begin_step(micro_batches[0])
        ratio = lr_ratio(
            recipe.schedule,
            tokens_seen=state.tokens_seen,
            total_tokens=recipe.train.tokens,
            spent_ratio=spent_ratio(self._agreement.seconds, recipe.train.max_hours),
        )
        bounds = limits(recipe.guard, state.recent, next_step=state.step)
        measured = train_step(
            session.backend,
            session.objective,
            micro_batches,
            lr_ratio=ratio,
            max_grad_norm=recipe.optim.max_grad_norm,
            momentum=momentum_at(recipe.optim, tokens_seen=state.tokens_seen),
            seed=recipe.seed,
            step=state.step,
            agreement=self._agreement,
            phases=self.phases,
            limits=bounds if recipe.guard.spike == "skip" else None,
        )
        self.phases.enter(named.LOOP)
        if measured is None:
            return False
        self.stop.at_once = False  # from here on there is something to save
        self._lr = recipe.optim.lr * ratio
        self._pending.append(_Pending(state.step, measured, bounds))
        state.step += 1
        state.tokens_seen = plan.tokens_before(state.step)
        state.cursor = kept_position(plan.first_position(state.step), recipe.data.skip)
        if recipe.train.max_hours is not None:
            state.elapsed_seconds = self._agreement.seconds
        self.phases.step = state.step
        self._ended = self._is_over()
        return True

    def _is_over(self) -> bool:
        """Whether no step is left, or no time; the same on all ranks, and asked once a step, for time goes on."""
        recipe, state = self.session.recipe, self.session.state
        if state.step < recipe.steps and spent_ratio(state.elapsed_seconds, recipe.train.max_hours) < 1.0:
            return False
        if state.step < recipe.steps:
            self.session.report(
                f"the {recipe.train.max_hours:g} hours of train.max_hours are over at step {state.step}"
            )
        return True

    def _after_step(self) -> None:
        """Log, evaluate and save in this order, each where it is due."""
        session, state, recipe = self.session, self.session.state, self.session.recipe
        last = self._ended
        log_due = last or _due(state.step, recipe.train.log_every_steps)
        evaluate_due = last or _due(state.step, recipe.evaluate.every_steps)
        save_due = last or _due(state.step, recipe.checkpoint.every_steps)
        newest = self._pending[-1].measured
        # The device is read one step late, so that it never waits for the host; before a line or a save, at once.
        self._read(keep=0 if log_due or evaluate_due or save_due else 1)
        if log_due:
            self._log(float(newest.grad_norm.item()))
        if evaluate_due and not self._evaluate():
            self._leave()
        if evaluate_due or save_due:
            session.list_set_aside()
        if save_due:
            self._save()
        self._saved += session.saver.finished()

    def _leave(self) -> None:
        """Save the last completed step, unless it is saved, and end.

        Raises:
            Preempted: always.
        """
        session, state = self.session, self.session.state
        self.phases.enter(named.LOOP)
        self._read(keep=0)
        self._agreement.close()
        session.list_set_aside()
        if state.step > self._saved_step:
            self._save()
        with self.phases.inside(named.SAVE):
            session.saver.wait()
        done = f"after step {state.step}; everything up to it is saved" if state.step else "before its first step"
        raise Preempted(
            f"stopped by a signal {done}", where=str(session.run), remedy="run the same command to continue"
        )

    def _save(self) -> None:
        with self.phases.inside(named.SAVE):
            if self.log is not None:
                self.log.sync()
            self.session.save()
        self._saved_step = self.session.state.step

    def _read(self, *, keep: int) -> None:
        """Read and judge all but the newest `keep` steps; all ranks read the same numbers.

        Raises:
            RollBack: too many updates in a row were not made.
            TrainingError: so it is, and the run has gone back as often as it may.
        """
        guard, state = self.session.recipe.guard, self.session.state
        while len(self._pending) > keep:
            pending = self._pending.pop(0)
            pending.measured.wait()
            loss, norm = float(pending.measured.loss.item()), float(pending.measured.grad_norm.item())
            made = add_measured(state.interval, pending.measured)
            spike = pending.limits.exceeded(loss, norm)
            if guard.spike != "off" and math.isfinite(loss) and math.isfinite(norm):
                state.recent = [*state.recent[-guard.window_steps :], (pending.step, loss, norm)]
            state.spikes += spike
            if pending.measured.overflow is not None and bool(pending.measured.overflow.item()):
                self._report_overflow(pending.step)
                continue
            if spike or not made:
                self._report_step(pending, loss, norm, spike=spike, made=made)
            state.consecutive_skips = 0 if made else state.consecutive_skips + 1
            state.skipped_steps += not made
            if state.consecutive_skips > self.session.recipe.train.max_skipped_steps:
                self._go_back(pending.step)

    def _report_overflow(self, step: int) -> None:
        """Count a step whose gradients left float16's range apart from those that are wrong."""
        state = self.session.state
        state.overflow_steps += 1
        first, last = self._positions(step, step)
        self.session.report(f"step {step + 1} not made: its gradients overflow in float16; the loss scale is halved")
        row: Row = {"kind": "guard", "step": step + 1, "action": "overflow", "reason": "float16"}
        self._write(row | {"positions": [first, last]})

    def _report_step(self, pending: _Pending, loss: float, norm: float, *, spike: bool, made: bool) -> None:
        """Say which step was out of line, and where its text stands."""
        session = self.session
        first, last = self._positions(pending.step, pending.step)
        what = (
            f"its loss {loss:.4g} or gradient norm {norm:.4g} is far above those before"
            if spike
            else "its loss or gradient is not finite"
        )
        session.report(
            f"step {pending.step + 1} {'stands out' if made else 'skipped'}: {what}; positions {first} to {last}, "
            f"shown by: lmssl data {session.run / 'recipe.yaml'} --position {first} --count {last - first + 1}"
        )
        row: Row = {"kind": "guard", "step": pending.step + 1, "action": "log" if made else "skip"}
        row |= {"reason": "spike" if spike else "not finite", "positions": [first, last]}
        row |= {"loss": _finite(loss), "grad_norm": _finite(norm)}
        if spike:
            row["limits"] = {"loss": _finite(pending.limits.loss), "grad_norm": _finite(pending.limits.grad_norm)}
        self._write(row)

    def _go_back(self, step: int) -> None:
        """Decide what follows on too many steps without an update, the last one this step."""
        session, state = self.session, self.session.state
        first_step = step - state.consecutive_skips + 1
        first, last = self._positions(first_step, step)
        what = f"{state.consecutive_skips} steps in a row were not made: their losses or gradients were not finite"
        what += ", or far above those before" if session.recipe.guard.spike == "skip" else ""
        if len(state.rollbacks) < session.recipe.guard.max_rollbacks:
            raise RollBack(step + 1, (first, last + 1), what)
        tried = f", and going back {len(state.rollbacks)} times did not help" if state.rollbacks else ""
        raise TrainingError(
            f"{what}{tried}",
            where=f"step {step + 1}, positions {first} to {last}",
            remedy="lower optim.lr, lengthen schedule.warmup_tokens, or use fp32; earlier checkpoints are intact",
        )

    def _positions(self, first_step: int, last_step: int) -> tuple[int, int]:
        """The first and the last position of some steps from 0."""
        plan, skip = self.session.recipe.batches, self.session.recipe.data.skip
        ends = plan.first_position(first_step), plan.first_position(last_step + 1) - 1
        return kept_position(ends[0], skip), kept_position(ends[1], skip)

    def _log(self, grad_norm: float) -> None:
        """One line of metrics from the interval's sums; clock fields stand apart: they differ between equal runs."""
        session, state = self.session, self.session.state
        recipe, plan = session.recipe, session.recipe.batches
        begun = state.step - state.interval.num_steps
        row: Row = {"kind": "train", "step": state.step, "tokens": state.tokens_seen}
        row |= interval_metrics(
            state.interval,
            num_tokens=state.tokens_seen - plan.tokens_before(begun),
            knows_bytes=all(corpus.kind != "tokens" for corpus in recipe.data.mixture),
            metrics=getattr(session.objective, "metrics", ()),
        )
        row |= {"lr": self._lr, "grad_norm": _finite(grad_norm), "skipped_steps": state.skipped_steps}
        if session.backend.loss_scale is not None:
            row |= {"overflow_steps": state.overflow_steps, "loss_scale": session.backend.loss_scale.state()["scale"]}
        row |= {"next_position": state.cursor, "time": self._telemetry.read(state.step, plan)}
        if self._saved:
            row["time"]["saves"] = [asdict(saved) for saved in self._saved]
            self._saved = []
        state.interval = Interval()
        rate = row["time"]["tokens_per_second"]
        self.console.advance(row, (plan.total_tokens - state.tokens_seen) / rate if rate else None)
        row["epochs"] = session.stream.epochs_at(state.cursor) if self.log is not None else {}
        self._write(row)

    def _evaluate_what_was_left(self) -> None:
        """Evaluate at the state's step where that is due, unless it was before the state was saved."""
        recipe, state = self.session.recipe, self.session.state
        due = state.step == 0 or self._ended or _due(state.step, recipe.evaluate.every_steps)
        if not due or not recipe.steps or state.evaluation.get("step") == state.step:
            return
        if not self._evaluate():
            self._leave()
        if self._ended and state.evaluation.get("step") == state.step:
            self._save()

    def _evaluate(self) -> bool:
        """Evaluate, where there is something to evaluate on; False: the ranks agreed to stop instead."""
        session, state, started = self.session, self.session.state, time.monotonic()
        with self.phases.inside(named.EVALUATE):
            self._num_evaluated = 0
            results = session.evaluate(self._goes_on)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            answers = None if self._agreement.stopping else session.answers(self._goes_on, time=now)
        if self._agreement.stopping:
            return False
        if results is not None:
            self._write_evaluation(results, time.monotonic() - started)
        if answers:
            state.evaluation |= {"step": state.step}
            self._write_answers(answers)
        return True

    def _write_evaluation(self, results: dict[str, LossResult], seconds: float) -> None:
        state = self.session.state
        row: Row = {"kind": "evaluate", "step": state.step, "tokens": state.tokens_seen}
        row |= evaluation_row(results, {split.corpus for split in self.session.stream.validation_sets()})
        state.evaluation = {"step": state.step, "loss": row["loss"], "bits_per_byte": row["bits_per_byte"]}
        if "sets" in row:
            state.evaluation["sets"] = row["sets"]
        row["time"] = {"seconds": seconds}
        self.console.note(evaluation_line(row))
        self._write(row, tracked={f"validation_{k}": v for k, v in row.items()} | {"step": state.step})

    def _write_answers(self, answers: list[Row]) -> None:
        """Lines of a suite and samples, here and in `evaluations.jsonl`."""
        session, state = self.session, self.session.state
        if self.log is not None:
            with suppress(EvaluationError):  # metrics.jsonl has them, too, and says where a disk is full
                append_rows(session.run / EVALUATIONS, answers)
        for answer in answers:
            for line in answer_lines(answer):
                self.console.note(line)
            self._write(answer_row(answer, tokens=state.tokens_seen), tracked=tracked_answer(answer))

    def _goes_on(self) -> bool:
        self._num_evaluated += 1
        self.phases.enter(named.EVALUATE, f"evaluation of micro-batch {self._num_evaluated - 1}")
        return not self._agreement.poll()

    def _write(self, row: Row, tracked: Row | None = None) -> None:
        if self.log is not None:
            self.log.write(row)
        self._track(row if tracked is None else tracked)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
