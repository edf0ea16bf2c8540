"""A heartbeat file per rank, and a thread that ends this rank where another has failed, is gone, or hangs.

::

    RUN/heartbeats/
        rank-00000.json    host, process, step, phase and when it began; written every second
        failed.json        the first failure of a rank, in words

A collective operation waits for ranks that will never come, and no exception reaches into it. So what went wrong
travels by files, which every rank's thread reads beside the work, and a rank that cannot leave by itself is ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lmssl.errors import TrainingError
from lmssl.output import complain
from lmssl.train.phases import ENDED, Phases

BEAT_SECONDS = 1.0
STALE_SECONDS = 30.0
"""After which a heartbeat that is not renewed says nothing any more."""
GRACE_SECONDS = 10.0
"""For the main thread to leave by itself, once this rank or another has failed."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    count: int
    """Phases entered, the same on all ranks that are equally far."""
    seconds: float
    """Since something moved."""


class Watch:
    """This rank's heartbeat, and its eyes on the others."""

    def __init__(
        self,
        folder: Path,
        phases: Phases,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        hang_seconds: float | None = None,
    ) -> None:
        self.folder = folder
        self._phases = phases
        self._rank, self._num_ranks = rank, num_ranks
        self._hang_seconds = hang_seconds
        self._host = socket.gethostname()
        self._neighbours: dict[int, int] = {}
        self._closed = threading.Event()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def prepare(self) -> None:
        """Write the first heartbeat; the main rank must have called `clear` before any rank comes here."""
        self._beat(str(self._phases))

    def start(self) -> None:
        """Begin to watch; every rank must have prepared."""
        for beat in self._beats():
            # A process that cannot be seen now, as from another container, is not gone when it cannot be seen later.
            if beat.host == self._host and beat.rank != self._rank and _lives(beat.pid):
                self._neighbours[beat.rank] = beat.pid
        self._thread.start()

    def close(self) -> None:
        """Stop watching; where nothing failed, say that this rank has ended well."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._failure is None:
            self._beat(ENDED)

    def fail(self, what: str) -> None:
        """Tell the other ranks that this one stops, and end it by force if it does not end soon."""
        if self._failure is None:
            self._failure = f"rank {self._rank} failed in {self._phases}: {what}"
            self._publish(self._failure)

    def failure_elsewhere(self, patience_seconds: float = 5.0) -> str | None:
        """What went wrong on another rank, in words; waits a little, for news of it may be on the way."""
        deadline = time.monotonic() + patience_seconds
        while self._num_ranks > 1:
            found = self._trouble_elsewhere()
            if found is not None:
                self._failure = found
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return None

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            before, looked = looked, time.monotonic()
            self._forgive_sleep(looked - before)
            self._beat(str(self._phases))
            elsewhere = self._trouble_elsewhere()
            failure = self._failure or elsewhere or self._hang()
            if failure is not None:
                self._show_where(failure)
                # The main thread leaves by itself where it can.
                if self._closed.wait(GRACE_SECONDS):
                    return
                self._end(failure)

    def _forgive_sleep(self, seconds: float) -> None:
        """A process that was stopped, as by a scheduler that suspends jobs, is not one that hangs.

        Args:
            seconds: between two looks of this thread.
        """
        if seconds > STALE_SECONDS:
            self._phases.slept()

    def _hang(self) -> str | None:
        """What hangs, found by whoever waited too long: the ranks that are least far, unless one of them moves."""
        seconds = self._phases.seconds
        if self._hang_seconds is None or seconds < self._hang_seconds:
            return None
        beats = list(self._beats())
        least = min((beat.count for beat in beats), default=0)
        behind = [beat for beat in beats if beat.count <= least] or [self._own_beat(str(self._phases))]
        if any(beat.seconds < self._hang_seconds and self._is_fresh(beat.rank) for beat in behind):
            return None
        ranks = "; ".join(f"rank {beat.rank} hangs in {beat.phase}" for beat in behind[:8])
        found = f"{ranks}; nothing has moved for {seconds:.0f} s"
        self._publish(found)
        return self._published() or found

    def _is_fresh(self, rank: int) -> bool:
        """Whether a rank still writes heartbeats, by the clock of the file system that both write to."""
        try:
            own, other = (self._path(number).stat().st_mtime for number in (self._rank, rank))
        except OSError:
            return False
        return own - other < STALE_SECONDS

    def _show_where(self, failure: str) -> None:
        """Print the stacks of this rank where it is the one that hangs, whoever found that first."""
        if f"rank {self._rank} hangs in" in failure:
            faulthandler.dump_traceback(all_threads=True)

    def _trouble_elsewhere(self) -> str | None:
        published = self._published()
        if published is not None:
            return published
        for rank, pid in self._neighbours.items():
            if not _lives(pid) and self._read(rank).phase != ENDED:
                found = f"rank {rank} is gone: its process {pid} on {self._host} has died or was killed"
                self._publish(found)
                return self._published() or found
        return None

    def _end(self, failure: str) -> None:
        """Leave without the main thread, which waits for something that will not come."""
        who = f"[rank {self._rank}] " if self._rank else ""
        complain(f"{who}error: {failure}; this rank ends in {self._phases}")
        for child in psutil.Process().children(recursive=True):
            try:
                child.kill()
            except psutil.Error:
                continue
        os._exit(TrainingError.exit_code)

    def _own_beat(self, phase: str) -> Beat:
        phases = self._phases
        return Beat(self._rank, self._host, os.getpid(), phases.step, phase, phases.count, phases.seconds)

    def _beat(self, phase: str) -> None:
        beat = self._own_beat(phase)
        text = json.dumps({**beat.__dict__, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        _replace(self._path(self._rank), text)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> Beat:
        """The latest beat of a rank; one that says nothing where it cannot be read."""
        try:
            values = json.loads(self._path(rank).read_text(encoding="utf-8"))
            values.pop("at")
            return Beat(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return Beat(rank, "", 0, 0, "nothing it could write down", -1, 0.0)

    def _beats(self) -> Iterable[Beat]:
        return map(self._read, range(self._num_ranks))

    def _publish(self, what: str) -> None:
        """Write the failure down, unless another rank was first."""
        try:
            with (self.folder / "failed.json").open("x", encoding="utf-8") as file:
                file.write(json.dumps({"rank": self._rank, "failure": what}))
        except OSError:
            return

    def _published(self) -> str | None:
        try:
            values: dict[str, Any] = json.loads((self.folder / "failed.json").read_text(encoding="utf-8"))
            return None if values["rank"] == self._rank else str(values["failure"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there is none, or it is being written


def clear(folder: Path, num_ranks: int) -> None:
    """Remove what an earlier session left: failures, and heartbeats of ranks that are no more."""
    folder.mkdir(exist_ok=True)
    (folder / "failed.json").unlink(missing_ok=True)
    for path in folder.glob("rank-*.json"):
        if not path.stem.removeprefix("rank-").isdecimal() or int(path.stem.removeprefix("rank-")) >= num_ranks:
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all; a full disk is no reason to stop."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        return
