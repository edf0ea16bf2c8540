"""Saves the checkpoints of a run, one at a time, beside training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmssl.checkpoint.folder import sweep
from lmssl.checkpoint.keep import Keep
from lmssl.checkpoint.protocol import Alone, Groups, Job, Meeting, RankWriter
from lmssl.checkpoint.space import shown_bytes


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written."""

    step: int
    num_bytes: int
    """Of its tensors and texts, those of other ranks included."""
    pause_seconds: float
    """How long training stood still."""
    total_seconds: float
    """From the beginning until it was on the disk, read back and others were pruned."""

    def __str__(self) -> str:
        return (
            f"checkpoint of step {self.step}: {shown_bytes(self.num_bytes)}, training paused "
            f"{self.pause_seconds:.2f} s, on the disk after {self.total_seconds:.2f} s"
        )


@dataclass
class _Current:
    """The save that was begun last."""

    job: Job
    began: float
    pause_seconds: float = 0.0
    ended: float = 0.0
    notes: tuple[str, ...] = ()


class Saver:
    """Saves the checkpoints of a run; every rank has one and calls the same methods in the same order.

    The copy of the tensors and the check of the disk are the pause of training. Asynchronous, the rest happens in a
    thread, in which ranks meet by a group of their own. The interpreter does not exit before that thread is done.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: Keep,
        clock: Callable[[], float],
        report: Callable[[str], None],
        asynchronous: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        group: Meeting | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Remove what killed saves of this run left behind.

        Args:
            clock: seconds from any fixed moment.
            report: told of every checkpoint that is finished, from the thread that asks.
            asynchronous: write in a thread.
            group: what ranks meet by; None: there is one.
            about: what manifests say of the run, such as backend, versions and fingerprints.
        """
        self.progress: Callable[[], None] = lambda: None
        """Called for each file that is written or read back, perhaps in the thread."""
        self._writer = RankWriter(run, rank, num_ranks, group or Alone(), keep, lambda: self.progress())
        self._clock, self._report, self._about = clock, report, dict(about or {})
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        self._current: _Current | None = None
        self._saved: list[Saved] = []
        if rank == 0:
            sweep(run)

    def save(
        self,
        step: int,
        *,
        tensors: Callable[[], Groups] | Groups,
        texts: Mapping[str, str],
        tokens: int = 0,
        finite: bool = True,
        validation_loss: float | None = None,
    ) -> float:
        """Save the present state; returns the seconds for which training stood still.

        A save that is under way is waited for first. A step that is saved, or being saved, is not saved again.

        Args:
            tensors: those that this rank owns, float32 on CPU, which nobody changes any more; or what copies them,
                which then counts as pause, and copies never exist twice.
            texts: file name -> contents; rank 0's are written.
            tokens: that were trained on.
            finite: whether the losses before this step were numbers; the newest such checkpoint is never pruned.
            validation_loss: nats per target, where it was measured at this step.

        Raises:
            CheckpointError: on every rank, where one could not save, where a tensor is not finite, or where the save
                before failed; nothing is left behind, and earlier checkpoints are intact.
        """
        began = self._clock()
        if self._current is not None and self._current.job.step == step and not self.failed:
            return 0.0
        self.wait()
        measured = validation_loss is not None and math.isfinite(validation_loss)
        facts = {"tokens": tokens, "finite": finite, "validation_loss": validation_loss if measured else None}
        facts |= self._about
        job = self._writer.prepare(step, tensors if callable(tensors) else lambda: tensors, texts, facts)
        current = _Current(job, began)
        if self._pool is None:
            self._write(current)
        else:
            self._writing = self._pool.submit(self._write, current)
        self._current = current
        if self._pool is None:
            current.pause_seconds = current.ended - began
            self._finish(current)
        else:
            current.pause_seconds = self._clock() - began
        return current.pause_seconds

    def _write(self, current: _Current) -> None:
        current.notes = tuple(self._writer.write(current.job))
        current.ended = self._clock()
        current.job = Job(current.job.step, {}, {}, {}, current.job.num_bytes)  # frees the copies

    @property
    def failed(self) -> bool:
        """Whether the save in the background failed, which `wait` raises; ranks may see it at different moments."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: the save failed; on every rank.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        current, self._current = self._current, None
        assert current is not None
        writing.result()
        self._current = current
        self._finish(current)

    def _finish(self, current: _Current) -> None:
        saved = Saved(current.job.step, current.job.num_bytes, current.pause_seconds, current.ended - current.began)
        self._saved.append(saved)
        for text in (str(saved), *current.notes):
            self._report(text)

    def finished(self) -> list[Saved]:
        """Checkpoints finished since the last call; waits for nothing and raises nothing."""
        if self._writing is not None and self._writing.done() and not self.failed:
            self.wait()
        saved, self._saved = self._saved, []
        return saved

    def go_back(self, step: int) -> None:
        """Remove the checkpoints of later steps, for the run goes on from this one.

        Raises:
            CheckpointError: the save that was under way failed; on every rank.
        """
        self.wait()
        self._current = None
        self._writer.discard_after(step)

    def close(self) -> None:
        """Wait for the save that is under way, and take no more.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
