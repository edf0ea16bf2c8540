"""Positions -> this rank's micro-batches.

A sampler in the main process turns positions into addresses, while a thread builds the windows ahead; loader
workers map, pack and gather. Row i of a batch belongs to micro-batch `i // (world_size * m)` and rank
`i % (world_size * m) // m`, where m is `micro_batch_sequences`; rows beyond the batch are empty. So all ranks run
equally many micro-batches of one shape, and positions alone decide what they hold.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from lmssl.data import fork_server
from lmssl.data.cancel import Cancelled
from lmssl.data.layout import Layout
from lmssl.data.order import kept_position
from lmssl.data.stream import SequenceStream
from lmssl.data.validation import ValidationSplit
from lmssl.data.window import OpenWindows, Window, WindowPlan, gather_rows
from lmssl.errors import DataError, LmsslError
from lmssl.recipe.batches import BatchPlan

T = TypeVar("T")

_PREFETCHED = 4


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """The sequences of one micro-batch."""

    ids_BT: npt.NDArray[np.int64]
    segments_BT: npt.NDArray[np.int32]
    """1, 2, ... per segment of the row, 0 for padding."""
    offsets_BT: npt.NDArray[np.int64]
    """Index within the segment."""
    positions_B: npt.NDArray[np.int64]
    """Position of each row, or its index in a validation split; -1 for an empty row."""
    num_bytes_B: npt.NDArray[np.float64]
    """Bytes of text of each row; of a cut document, in proportion."""

    @property
    def num_padding_tokens(self) -> int:
        """Tokens of the sequences here that hold no text; empty rows are no sequences."""
        return int((self.segments_BT[self.positions_B >= 0] == 0).sum())

    @classmethod
    def of(cls, found: Sequence[tuple[int, Window, int] | None], layout: Layout) -> SequenceBatch:
        """A micro-batch of (position, window, index in it); None: an empty row."""
        rows = gather_rows([row and row[1:] for row in found], layout)
        positions = np.array([-1 if row is None else row[0] for row in found], dtype=np.int64)
        return cls(rows.ids_BT, rows.segments_BT, rows.offsets_BT, positions, rows.num_bytes_B)


def num_micro_batches(num_sequences: int, micro_batch_sequences: int, world_size: int) -> int:
    """Micro-batches each rank runs for so many sequences."""
    return -(-num_sequences // (micro_batch_sequences * world_size))


def rank_rows(
    number: int, num_sequences: int, micro_batch_sequences: int, world_size: int, rank: int
) -> list[int | None]:
    """Which sequences stand in the rows of a rank's micro-batch; None: an empty row."""
    first = (number * world_size + rank) * micro_batch_sequences
    return [i if i < num_sequences else None for i in range(first, first + micro_batch_sequences)]


def training_batches(
    stream: SequenceStream,
    *,
    plan: BatchPlan,
    micro_batch_sequences: int,
    world_size: int,
    rank: int,
    start_step: int,
    num_steps: int,
    prepare: Callable[[SequenceBatch], T],
    workers: int,
) -> Iterator[list[T]]:
    """The micro-batches of this rank, one list per step, from `start_step` on for `num_steps` steps.

    `plan` says which positions a step reads, of the kept ones, those outside the recipe's `data.skip`.
    Where sequences have another length than the first, micro-batches have as many tokens, and at least one sequence.
    `prepare` runs in the loader worker and must be picklable for `workers > 0`. Close the iterator to stop early.

    Raises:
        DataError: the text cannot be read or changed, or a loader worker died.
    """
    steps = range(start_step, start_step + num_steps)

    def micro_sequences(step: int) -> int:
        return max(1, micro_batch_sequences * plan.sequence_length(0) // plan.sequence_length(step))

    ahead = _BuildAhead(stream)

    def requests() -> Iterator[_Request]:
        for step in steps:
            first, count, size = plan.first_position(step), plan.num_sequences(step), micro_sequences(step)
            for number in range(num_micro_batches(count, size, world_size)):
                rows = rank_rows(number, count, size, world_size, rank)
                yield _request(stream, first, rows)
            # Last, so that the first batch does not wait for windows that come later.
            ahead.want(kept_position(first, stream.section.skip))

    gatherer = _Gatherer(stream.layout, 2 * len(stream.section.mixture), prepare)
    source: _WorkerSource[T] | _ThreadSource[T] | None = None
    try:
        if workers:
            first_step = num_micro_batches(plan.num_sequences(start_step), micro_sequences(start_step), world_size)
            source = _WorkerSource(gatherer, requests(), workers, num_here=first_step if num_steps else 0)
        else:
            source = _ThreadSource(gatherer[request] for request in requests())
        for step in steps:
            per_step = num_micro_batches(plan.num_sequences(step), micro_sequences(step), world_size)
            yield [source.get() for _ in range(per_step)]
    finally:
        stream.cancel.set()
        if source is not None:
            source.close()
        ahead.close()
        stream.cancel.clear()


def validation_batches(
    split: ValidationSplit,
    *,
    micro_batch_sequences: int,
    world_size: int,
    rank: int,
    prepare: Callable[[SequenceBatch], T],
) -> Iterator[T]:
    """The micro-batches of this rank over a validation split, in order; all ranks run equally many of one shape."""

    def results() -> Iterator[T]:
        for number in range(num_micro_batches(split.num_sequences, micro_batch_sequences, world_size)):
            rows = rank_rows(number, split.num_sequences, micro_batch_sequences, world_size, rank)
            found = [None if index is None else (index, split.window, index) for index in rows]
            yield prepare(SequenceBatch.of(found, split.window.layout))

    source = _ThreadSource(results())
    try:
        for _ in range(num_micro_batches(split.num_sequences, micro_batch_sequences, world_size)):
            yield source.get()
    finally:
        source.close()


@dataclass(frozen=True)
class _Request:
    """What a worker needs to know of a micro-batch: per row the position, the plan and the index in its window."""

    rows: tuple[tuple[int, int, int] | None, ...]
    plans: tuple[WindowPlan, ...]
    layout: Layout
    """Of all of them."""


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the main process."""

    error: Exception


def _request(stream: SequenceStream, first: int, rows: list[int | None]) -> _Request:
    plans: dict[WindowPlan, int] = {}
    found: list[tuple[int, int, int] | None] = []
    for row in rows:
        if row is None:
            found.append(None)
            continue
        position = kept_position(first + row, stream.section.skip)
        address, plan = stream.locate(position)
        found.append((position, plans.setdefault(plan, len(plans)), address.index))
    return _Request(tuple(found), tuple(plans), stream.layout_at(kept_position(first, stream.section.skip)))


class _Gatherer(Dataset[Any], Generic[T]):
    """The map-style dataset: a request in, a prepared micro-batch out."""

    def __init__(self, layout: Layout, num_windows: int, prepare: Callable[[SequenceBatch], T]) -> None:
        self._windows = OpenWindows(layout, num_windows)
        self._prepare = prepare

    def __getitem__(self, request: _Request) -> T:
        windows = [self._windows.get(plan) for plan in request.plans]
        found = [row and (row[0], windows[row[1]], row[2]) for row in request.rows]
        return self._prepare(SequenceBatch.of(found, request.layout))


class _Carrying(Dataset[Any]):
    """A gatherer that returns its errors, because a loader keeps no more of an exception than its text."""

    def __init__(self, gatherer: _Gatherer[Any]) -> None:
        self._gatherer = gatherer

    def __getitem__(self, request: _Request) -> Any:
        try:
            return self._gatherer[request]
        except LmsslError as error:
            return _Failure(error)


class _BuildAhead:
    """A thread that keeps every corpus one window ahead of the last wanted position."""

    def __init__(self, stream: SequenceStream) -> None:
        self._stream = stream
        self._position = 0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="build-ahead", daemon=True)
        self._started = False

    def want(self, position: int) -> None:
        """Tell how far the reader is."""
        self._position = position
        self._wake.set()
        if not self._started:
            self._started = True
            self._thread.start()

    def close(self) -> None:
        """Stop; the stream's `cancel` must be set."""
        self._wake.set()
        if self._started:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                if self._stream.cancel.is_set():
                    return
                self._stream.build_ahead(self._position)
            except Cancelled:
                return
            except LmsslError as error:
                # The reader meets the same error when it gets there; until then there is text to train on.
                self._stream.report(f"building ahead stopped: {error.what}")
                return


class _WorkerSource(Generic[T]):
    """Micro-batches from loader processes, in order; the first few made here, while those processes start."""

    def __init__(
        self, gatherer: _Gatherer[T], requests: Iterator[_Request], workers: int, *, num_here: int = 0
    ) -> None:
        self._gatherer = gatherer
        self._here: deque[_Request] = deque()

        def others() -> Iterator[_Request]:  # drawn from only once the processes are on their way
            self._here.extend(islice(requests, num_here))
            yield from requests

        loader = DataLoader(
            _Carrying(gatherer),
            sampler=others(),  # any iterable serves; it is drawn from in this process
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=fork_server.start(),
            prefetch_factor=_PREFETCHED,
            worker_init_fn=_leave_signals_to_main,
            generator=torch.Generator(),  # else it draws a seed, which nothing uses, from the global one
        )
        self._batches = iter(loader)

    def get(self) -> T:
        """The next one."""
        if self._here:
            return self._gatherer[self._here.popleft()]
        try:
            item: T | _Failure = next(self._batches)
        except RuntimeError as error:
            explained = dead_loader(error)
            if explained is None:
                raise
            raise explained from error
        return _unwrapped(item)

    def close(self) -> None:
        """Stop the processes and wait for them."""
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:  # what the iterator's finaliser calls; references must not decide when
            shutdown()


def dead_loader(error: BaseException) -> DataError | None:
    """What torch means where a loader process died, or None; its handler of signals raises wherever Python is then."""
    said = str(error)
    if not isinstance(error, RuntimeError) or not ("exited unexpectedly" in said or "killed by signal" in said):
        return None
    return DataError(
        f"a loader process died: {said.strip()}",
        where="data.workers",
        remedy="look for an out-of-memory message of the system; data.workers=0 loads without processes",
    )


class _ThreadSource(Generic[T]):
    """Results of an iterator that a thread runs a few steps ahead."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._queue: queue.Queue[T | _Failure] = queue.Queue(_PREFETCHED)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """The next one."""
        return _unwrapped(self._queue.get())

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except Exception as error:  # whatever it is, the main thread is to raise it; after `close` nobody asks
            self._put(_Failure(error))

    def _put(self, item: T | _Failure) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def _unwrapped(item: T | _Failure) -> T:
    if isinstance(item, _Failure):
        raise item.error
    return item


def _leave_signals_to_main(worker: int) -> None:
    """A signal to the whole process group must not stop loading while the main process still saves."""
    del worker
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
