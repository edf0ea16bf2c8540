"""Tokenize a recipe's corpora into the cache before a run: in several processes, on several machines.

Every chunk is built under its own lock and renamed into place, so any number of `prepare` and `train` processes
may share a cache, and one that is killed loses the chunk in work at most.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmssl.data import fork_server
from lmssl.data.cache import LOCKS_ARE_MISSING, ChunkCache, Claim
from lmssl.data.cancel import Busy, never
from lmssl.data.chunk import Chunk
from lmssl.data.corpus import Unit, check_first_record, list_units
from lmssl.data.layout import Layout
from lmssl.data.remote import RemoteFiles
from lmssl.data.stream import evaluation_text, list_sets, open_sets
from lmssl.data.validation import set_chunks
from lmssl.errors import DataError
from lmssl.objective.needs import check_tokenizer
from lmssl.recipe.data import DataSection
from lmssl.recipe.objective import seps_per_segment
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

_LINE_SECONDS = 10.0
_MAX_THREADS = 4
"""Threads of one process that build; reading JSON holds the interpreter, and more would wait for it."""
_MIN_POOL_BYTES = 176 << 20
"""Text that is worth further processes: they do a fifth less work than threads, and begin two seconds late."""
_PRELOADED = ("lmssl.prepare", "gigatoken")
"""What a worker imports."""


@dataclass(frozen=True)
class Prepared:
    """What some units turned into."""

    num_chunks: int = 0
    num_built: int = 0
    """Chunks that were not there before."""
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    """Bytes of text."""
    num_bad: int = 0
    built_tokens: int = 0
    """Tokens of the chunks that were built."""

    def __add__(self, other: Prepared) -> Prepared:
        values = (getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        return Prepared(*values)


def prepare(
    recipe: Recipe,
    *,
    rank: int,
    world_size: int,
    workers: int,
    clock: Callable[[], float],
    report: Callable[[str], None],
    console: Console | None,
) -> Prepared:
    """Build every chunk of every corpus, and what evaluation reads of `validation.sets`; returns the sums over all.

    Each rank begins at its own share and then goes through the others', so that slow ranks are helped. What another
    process has in work is passed over and waited for behind the rest of its unit, and what it has built is counted.

    Args:
        workers: cores of this rank to use; 1 builds in this thread.
        clock: seconds.
        report: receives one line per event worth knowing.
        console: where progress is shown; None: nowhere.
    Raises:
        DataError: a corpus cannot be read, has too many bad records, or the cache cannot be written; or the tokenizer
            lacks a token that the data asks for.
        TokenizerError: it lacks one that the objective needs.
    """
    section = recipe.data
    remote = RemoteFiles(Path(section.cache).expanduser() / "remote", section.remote_cache_bytes)
    listed = [list_units(corpus, chunk_bytes=section.chunk_bytes, remote=remote) for corpus in section.mixture]
    for corpus_units in listed:
        check_first_record(corpus_units)
    sets = list_sets(section, remote)
    units = [unit for corpus_units in listed for unit in corpus_units]
    first = len(units) * rank // world_size
    own = units[first:] + units[:first]
    settings = _Settings(find(recipe.tokenizer.path), section)
    num_bytes = sum(unit.num_bytes for unit in units)
    in_processes = workers > 1 and num_bytes >= _MIN_POOL_BYTES and len(units) >= 2 * workers
    if in_processes:
        fork_server.start(_PRELOADED)  # it imports while the tokenizer is loaded here
    tokenizer = load_tokenizer(settings.tokenizer)
    check_tokenizer(recipe.objective, tokenizer)  # or training would refuse it after all this work
    layout = Layout.of(section, tokenizer, recipe.data_seed, seps_per_segment=seps_per_segment(recipe.objective))
    progress = _Progress(num_bytes, clock, console)
    if not in_processes:
        builders = min(workers, _MAX_THREADS)
        cache = settings.open(report, tokenizer, threads=builders)
        threads = builders + (workers > 1)
        found = _follow(build_units(cache, own, threads=threads), units, section.max_bad_records, progress)
    else:
        with _Pool(settings, workers - 1) as pool:
            cache = settings.open(report, tokenizer, threads=1)
            found = _follow(pool.run(own, cache), units, section.max_bad_records, progress)
    return found + _build_sets(section, sets, layout, cache)


def _build_sets(section: DataSection, listed: Sequence[Sequence[Unit]], layout: Layout, cache: ChunkCache) -> Prepared:
    """Build the chunks that training will read of `validation.sets`, up to its budget of tokens."""
    total = Prepared()
    if section.validation is None or not listed:
        return total
    sets, before = open_sets(listed, section, layout, cache), cache.num_built
    for chunk in set_chunks(sets, layout, budget_tokens=section.validation.tokens):
        num_built, before = cache.num_built - before, cache.num_built
        total += replace(_counts(chunk), num_built=num_built, built_tokens=chunk.meta.num_tokens * num_built)
    return total


def build_units(cache: ChunkCache, units: Iterable[Unit], *, threads: int) -> Iterator[tuple[Unit, Prepared]]:
    """Build what is missing of some units, and yield each unit with the counts of each of its chunks.

    This thread reads; with more than one, the others build chunks meanwhile. Chunks on disk are not read again, but to
    look for evaluation text.
    """
    if threads == 1:
        for unit, found in _missing(cache, units):
            yield unit, _counts(found)
        return
    running: dict[Future[Prepared], Unit] = {}
    with ThreadPoolExecutor(threads - 1) as executor:
        for unit, found in _missing(cache, units):
            if isinstance(found, Chunk):
                yield unit, _counts(found)
                continue
            running[executor.submit(_counts, found)] = unit
            if len(running) > threads:
                yield from _finished(running)
        while running:
            yield from _finished(running)


def _missing(cache: ChunkCache, units: Iterable[Unit]) -> Iterator[tuple[Unit, Chunk | Claim]]:
    """The chunks of some units: as they are on disk, or the text of each one more to build.

    Those that another process has in work come after the rest of their unit; so the ranks share even a single file.
    """
    for unit in units:
        index, is_last, passed = 0, False, list[int]()
        while not is_last:
            try:
                found = cache.peek(unit, index) or cache.claim(unit, index, wait=False)
            except Busy:
                is_last = cache.read_past(unit, index)
                passed.append(index)
            else:
                is_last = found.meta.is_last if isinstance(found, Chunk) else found.is_last
                yield unit, found
            index += 1
        for index in passed:
            yield unit, cache.peek(unit, index) or cache.claim(unit, index)


def _counts(found: Chunk | Claim) -> Prepared:
    is_new = isinstance(found, Claim) and found.is_new
    meta = found.build().meta if isinstance(found, Claim) else found.meta
    return Prepared(
        num_chunks=1,
        num_built=int(is_new),
        num_documents=meta.num_documents,
        num_tokens=meta.num_tokens,
        num_bytes=meta.num_bytes,
        num_bad=meta.num_bad,
        built_tokens=meta.num_tokens if is_new else 0,
    )


def _finished(running: dict[Future[Prepared], Unit], timeout: float | None = None) -> Iterator[tuple[Unit, Prepared]]:
    done, _ = wait(running, timeout, return_when=FIRST_COMPLETED)
    for future in done:
        try:
            yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a process that tokenizes died: {error}",
                where="lmssl prepare --workers",
                remedy="look for an out-of-memory message of the system; fewer workers take less memory; "
                "what was built is kept",
            ) from error


@dataclass(frozen=True)
class _Settings:
    """What a process needs to open the cache."""

    tokenizer: Path
    section: DataSection

    def open(self, report: Callable[[str], None], tokenizer: Tokenizer, *, threads: int) -> ChunkCache:
        return ChunkCache(
            Path(self.section.cache).expanduser(),
            tokenizer,
            max_bad_records=self.section.max_bad_records,
            report=report,
            cancelled=never,
            evaluation=evaluation_text(self.section, report),
            threads=threads,
        )


class _Pool:
    """Processes that build units; leaving it early drops what has not begun."""

    def __init__(self, settings: _Settings, processes: int) -> None:
        self._processes = processes
        self._executor = ProcessPoolExecutor(
            processes,
            mp_context=get_context(fork_server.start(_PRELOADED)),
            initializer=_open_worker,
            initargs=(settings,),
        )

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, units: Sequence[Unit], cache: ChunkCache) -> Iterator[tuple[Unit, Prepared]]:
        """Results as they come; a few units wait in front of the processes, and this one builds as well.

        The first process is started by a thread, as its server imports for most of a second before it answers.
        """
        waiting = deque(units)
        first = waiting.popleft()
        with ThreadPoolExecutor(1) as executor:
            starting = executor.submit(self._executor.submit, _in_worker, first)
            # A unit of many chunks would keep this process while the others have nothing to do.
            while waiting and waiting[0].chunk_bytes is None and not starting.done():
                yield from build_units(cache, [waiting.popleft()], threads=1)
        running = {starting.result(): first}
        while waiting or running:
            while waiting and len(running) < 2 * self._processes:
                unit = waiting.popleft()
                running[self._executor.submit(_in_worker, unit)] = unit
            if waiting:
                yield from build_units(cache, [waiting.popleft()], threads=1)
            yield from _finished(running, timeout=0 if waiting else None)


_cache: ChunkCache | None = None
"""The cache of a worker process: opened once, because its tokenizer takes a second to load."""


def _open_worker(settings: _Settings) -> None:
    global _cache
    threading.Thread(target=_end_with_main, name="main process", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it and lets the chunk in work be finished
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # a pool that is broken ends its processes with it
    _cache = settings.open(_say_in_worker, load_tokenizer(settings.tokenizer), threads=1)


def _say_in_worker(line: str) -> None:
    if not line.startswith(LOCKS_ARE_MISSING):  # which the main process says
        print(line)


def _end_with_main() -> None:
    """Nobody reads what a worker does for a main process that was killed; it waits for that in a thread of its own."""
    main = parent_process()
    assert main is not None
    connection.wait([main.sentinel])
    os._exit(1)  # the chunk in work stays a temporary folder, as if the worker had been killed too


def _in_worker(unit: Unit) -> Prepared:
    assert _cache is not None
    return sum((prepared for _, prepared in build_units(_cache, [unit], threads=1)), Prepared())


def _follow(
    results: Iterable[tuple[Unit, Prepared]], units: Sequence[Unit], max_bad_records: int, progress: _Progress
) -> Prepared:
    """Sum the results and show how far they are."""
    total, num_bad = Prepared(), dict.fromkeys((unit.corpus for unit in units), 0)
    with progress:
        for unit, prepared in results:
            total += prepared
            num_bad[unit.corpus] += prepared.num_bad
            if num_bad[unit.corpus] > max_bad_records:
                raise DataError(
                    f"corpus {unit.corpus!r} has more than {max_bad_records} unreadable records",
                    where=unit.parts[0].path,
                    remedy="repair the file, or raise data.max_bad_records to leave such records out",
                )
            # Of a unit of one chunk the size is known better than the text that was found in it.
            progress.advance(unit.num_bytes if unit.chunk_bytes is None else prepared.num_bytes, total)
    return total


class _Progress:
    """One live line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, num_bytes: int, clock: Callable[[], float], console: Console | None) -> None:
        self._num_bytes = max(1, num_bytes)
        self._console = console
        self._live = console is not None and console.is_terminal
        self._done = 0
        self._clock = clock
        self._began = self._said = clock()
        self._bar = Progress(
            TextColumn("tokenizing"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("prepare", total=self._num_bytes, rate="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, num_bytes: int, total: Prepared) -> None:
        """Show that so many more bytes are done."""
        self._done += num_bytes
        now = self._clock()
        rate = f"{total.built_tokens / max(1e-9, now - self._began) / 1e6:.2f} M tokens/s"
        if self._live:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif self._console is not None and now - self._said >= _LINE_SECONDS:
            self._said = now
            left = (now - self._began) * (self._num_bytes - self._done) / max(1, self._done)
            share = min(1.0, self._done / self._num_bytes)
            self._console.print(f"tokenizing {share:4.0%}  {rate}  eta {max(0.0, left):.0f} s", highlight=False)
