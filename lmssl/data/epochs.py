"""One corpus as a row of windows without end: epoch after epoch, each in its own order."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from lmssl.data.cache import Chunk, ChunkCache, bad_records
from lmssl.data.corpus import Unit, too_many_bad
from lmssl.data.ledger import Ledger, LedgerEntry
from lmssl.data.order import permutation
from lmssl.data.units import empty_corpus
from lmssl.data.window import Layout, Window, WindowPlan
from lmssl.errors import DataError

_KEPT_PLANS = 8
Place = tuple[int, int]
"""Rank of a unit in the epoch's permutation, and chunk of that unit."""


class Epochs:
    """The windows of one corpus, built as far as someone asked, and entered into the ledger."""

    def __init__(
        self,
        units: Sequence[Unit],
        cache: ChunkCache,
        layout: Layout,
        ledger: Ledger,
        *,
        window_chunks: int,
        max_bad_records: int,
    ) -> None:
        self.corpus = units[0].corpus
        self.units = tuple(units)
        self._cache = cache
        self._layout = layout
        self._ledger = ledger
        self._window_chunks = window_chunks
        self._max_bad_records = max_bad_records
        self._plans: OrderedDict[int, WindowPlan] = OrderedDict()
        self._building = threading.RLock()

    def find(self, k: int) -> tuple[int, int]:
        """Number of the window that holds the k-th sequence, building as far as it takes, and the index in it."""
        found = self._ledger.find(self.corpus, k)
        while found is None:
            with self._building:
                found = self._ledger.find(self.corpus, k)  # another thread may have been faster
                if found is None:
                    self.extend()
        return found

    def ensure(self, number: int) -> LedgerEntry:
        """The ledger's line about a window, building as far as it takes."""
        with self._building:
            while number >= len(self._ledger.entries(self.corpus)):
                self.extend()
        return self.entry(number)

    def entry(self, number: int) -> LedgerEntry:
        """The ledger's line about a window."""
        return self._ledger.entries(self.corpus)[number]

    def plan(self, number: int) -> WindowPlan:
        """What a window of the ledger is made of; missing chunks are built.

        Raises:
            DataError: the text is no longer what it was when the ledger was written.
        """
        plan = self._plans.get(number)
        if plan is not None:
            return plan
        with self._building:
            entry = self.entry(number)
            chunks, _ = self._take(entry.epoch, self._start(number), entry.num_chunks)
            if _checksum(chunks) != entry.checksum:
                sources = sorted({path for chunk in chunks for path in chunk.meta.sources})
                raise DataError(
                    f"the text of corpus {self.corpus!r} changed since the run's last checkpoint",
                    where=", ".join(sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else ""),
                    remedy="restore these files, or start a new run",
                )
            return self._remember(number, self._plan_of(entry.epoch, entry.window, chunks))

    def extend(self) -> None:
        """Build the next window and enter it.

        Raises:
            DataError: a whole epoch holds no sequence, or too many records are unreadable.
        """
        with self._building:
            number = len(self._ledger.entries(self.corpus))
            epoch, window = self._next(number)
            # The first windows are small, so that training starts soon.
            limit = self._window_chunks if epoch else min(self._window_chunks, 1 << min(window, 30))
            chunks, place = self._take(epoch, self._start(number), limit)
            built = Window(self._plan_of(epoch, window, chunks), self._layout)
            entry = LedgerEntry(
                corpus=self.corpus,
                epoch=epoch,
                window=window,
                num_chunks=len(chunks),
                num_sequences=built.num_sequences,
                checksum=_checksum(chunks),
                next_unit=place[0],
                next_chunk=place[1],
                ends_epoch=place[0] == len(self.units),
                num_documents=built.num_documents,
                num_tokens=built.num_tokens,
                num_bytes=built.num_bytes,
                num_padding=built.packing.num_padding,
                num_cut_documents=built.packing.num_cut_documents,
                num_bad=sum(chunk.meta.num_bad for chunk in chunks),
            )
            self._check(entry, chunks)
            self._remember(number, built.plan)
            self._ledger.append(entry)

    def chunks(self, purpose: str) -> Iterator[Chunk]:
        """All chunks, units in a seeded order of their own."""
        for unit in permutation(len(self.units), self._layout.seed, purpose, self.corpus):
            index, chunk = 0, self._cache.get(self.units[unit], 0)
            yield chunk
            while not chunk.meta.is_last:
                index += 1
                chunk = self._cache.get(self.units[unit], index)
                yield chunk

    def _next(self, number: int) -> tuple[int, int]:
        """Epoch and window that follow the first `number` windows."""
        if number == 0:
            return 0, 0
        last = self.entry(number - 1)
        return (last.epoch + 1, 0) if last.ends_epoch else (last.epoch, last.window + 1)

    def _start(self, number: int) -> Place:
        last = self.entry(number - 1) if number else None
        return (0, 0) if last is None or last.ends_epoch else (last.next_unit, last.next_chunk)

    def _take(self, epoch: int, place: Place, limit: int) -> tuple[list[Chunk], Place]:
        """Up to `limit` chunks from a place on, never beyond the epoch, and the place after them."""
        order = permutation(len(self.units), self._layout.seed, "units", self.corpus, epoch)
        rank, index = place
        chunks: list[Chunk] = []
        while rank < len(self.units) and len(chunks) < limit:
            chunk = self._cache.get(self.units[order[rank]], index)
            chunks.append(chunk)
            rank, index = (rank + 1, 0) if chunk.meta.is_last else (rank, index + 1)
        return chunks, (rank, index)

    def _plan_of(self, epoch: int, window: int, chunks: Sequence[Chunk]) -> WindowPlan:
        return WindowPlan(self.corpus, epoch, window, tuple(chunk.path for chunk in chunks))

    def _remember(self, number: int, plan: WindowPlan) -> WindowPlan:
        self._plans[number] = plan
        while len(self._plans) > _KEPT_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _check(self, entry: LedgerEntry, chunks: Sequence[Chunk]) -> None:
        windows = [earlier for earlier in self._ledger.entries(self.corpus) if earlier.epoch == entry.epoch] + [entry]
        if sum(window.num_bad for window in windows) > self._max_bad_records:
            path, bad = next(found for chunk in chunks for found in bad_records(chunk))
            raise too_many_bad(self.corpus, path, bad, self._max_bad_records)
        if entry.ends_epoch and not any(window.num_sequences for window in windows):
            if not any(chunk.meta.num_documents for chunk in self.chunks("validation")):
                raise empty_corpus(self.corpus)
            raise DataError(
                "every document of the corpus is held out for validation",
                where=f"data.mixture, corpus {self.corpus!r}",
                remedy="lower data.validation.ratio, add text, or set data.validation: null",
            )


def _checksum(chunks: Sequence[Chunk]) -> str:
    return hashlib.blake2b("".join(chunk.meta.checksum for chunk in chunks).encode(), digest_size=16).hexdigest()
