"""What this rank is doing, and how long it took: read by the log, and by the watch over hanging ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

DATA, COUNTS, COMPUTE, EXCHANGE, UPDATE = "data", "counts", "forward and backward", "exchange", "update"
LOOP, EVALUATE, SAVE, OPEN, ENDED = "loop", "evaluate", "save", "open", "ended"
ON_DEVICE = (COMPUTE, EXCHANGE, UPDATE)


class Phases:
    """The present phase and the seconds of each since the last reading.

    On a GPU, work is queued and done later. What is queued in `ON_DEVICE` is timed by events in the queue, which nobody
    waits for; the rest is the host's time. An exchange of gradients that overlaps with backward counts as backward.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queued = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self.name = OPEN
        self.detail: str | None = None
        """Which part of it, in words."""
        self.step = 0
        """Completed steps."""
        self.count = 0
        """How many phases were entered, the same on all ranks that are equally far."""
        self.since = clock()
        """When this one was, by the clock."""
        self._moved_at = self.since

    def enter(self, name: str, detail: str | None = None) -> None:
        """End the present phase and begin another, or a further part of it."""
        now = self._clock()
        if not (self._queued and self.name in ON_DEVICE):
            self._seconds[self.name] = self._seconds.get(self.name, 0.0) + now - self.since
        if self._queued and name != self.name and (name in ON_DEVICE or self.name in ON_DEVICE):
            self._mark(name)
        self.name, self.detail, self.since = name, detail, now
        self.count += 1

    @property
    def seconds(self) -> float:
        """Since the present phase began, a file of the save that it is was done, or the process slept."""
        return self._clock() - max(self.since, self._moved_at)

    def saved_file(self) -> None:
        """Say that a save goes on; from any thread, for one in the background may be what training waits for."""
        if self.name == SAVE:
            self._moved_at = self._clock()

    def slept(self) -> None:
        """Say that the whole process was stopped for a while, and could not move."""
        self._moved_at = self._clock()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A phase inside another, which goes on afterwards."""
        outer, detail = self.name, self.detail
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer, detail)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading. Where a device is timed, what it was given must be done."""
        self.enter(self.name, self.detail)
        self.count -= 1
        found, self._seconds = self._seconds, {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name in ON_DEVICE:
                end.synchronize()
                found[name] = found.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._marks = self._marks[-1:]
        return found

    def _mark(self, name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def __str__(self) -> str:
        """In words, for messages."""
        return f"{self.detail or self.name} in step {self.step + 1}"
