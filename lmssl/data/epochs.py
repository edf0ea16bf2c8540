"""One corpus as a row of windows without end: epoch after epoch, each in its own order."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmssl.data.cache import ChunkCache
from lmssl.data.chunk import Chunk, bad_records
from lmssl.data.columns import stored_array
from lmssl.data.corpus import Unit, too_many_bad
from lmssl.data.filters import SeenTexts, duplicates_name, window_duplicates
from lmssl.data.layout import Layout
from lmssl.data.ledger import Ledger, LedgerEntry
from lmssl.data.order import IntArray, permutation
from lmssl.data.records import BadRecord
from lmssl.data.units import empty_corpus
from lmssl.data.window import Window, WindowPlan
from lmssl.errors import DataError

_KEPT_PLANS = 512
"""Making one anew reads the description of each of its chunks."""
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
        self._seen: tuple[int, SeenTexts] = 0, SeenTexts()
        """A window, and the texts of its epoch before it."""
        self._sizes: tuple[int, IntArray, npt.NDArray[np.float64], float] | None = None
        """Of the epoch asked about last: the order of units, bytes before each, bytes of all."""
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
            entry, chunks = self.entry(number), self._known_chunks(number)
            return self._remember(number, self._plan_of(number, entry.epoch, entry.window, chunks))

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
            repacked = self._repacked(number)
            if repacked:
                limit = self.entry(number - 1).num_chunks
            chunks, place = self._take(epoch, self._start(number), limit)
            built = Window(self._plan_of(number, epoch, window, chunks), self._layout)
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
                num_bad=0 if repacked else sum(chunk.meta.num_bad for chunk in chunks),
                sequence_length=built.plan.sequence_length,
                **asdict(built.dropped),
            )
            self._check(entry, chunks)
            self._remember(number, built.plan)
            self._ledger.append(entry)

    def bad_records(self, number: int) -> list[tuple[str, BadRecord]]:
        """Unreadable records of a window of the ledger, each with its file."""
        if not self.entry(number).num_bad:
            return []
        return [found for chunk in self._known_chunks(number) for found in bad_records(chunk)]

    def passed(self, k: int) -> float:
        """Epochs that the first k sequences are.

        Whole epochs are exact. Inside one it is the share of the corpus's bytes up to there, from the sizes of its
        units, and so a function of k alone, however far windows are built.
        """
        if not k:
            return 0.0
        number, index = self.find(k - 1)
        entry = self.entry(number)
        begin, end = self._shares(number)
        return entry.epoch + begin + (end - begin) * (index + 1) / entry.num_sequences

    def estimate_sequences(self) -> int:
        """Sequences of an epoch: of its first chunk, in proportion to bytes; exact where one window is all.

        Raises:
            DataError: the size of the corpus is not known in advance.
        """
        number, found = 0, 0.0
        while True:
            entry = self.ensure(number)
            if entry.ends_epoch:
                return sum(entry.num_sequences for entry in self._ledger.entries(self.corpus)[: number + 1])
            # Full sequences; the last one of a small window is not, except where each document takes its own.
            alone = self._layout.packing == "none"
            found += entry.num_sequences if alone else entry.num_tokens / self._layout.sequence_length
            if found:
                break
            number += 1
        if not any(unit.num_bytes for unit in self.units):
            raise DataError(
                "the corpus has max_epochs, and its size is not known in advance",
                where=f"data.mixture, corpus {self.corpus!r}",
                remedy="set its max_epochs: null and give it a weight that suits its size",
            )
        return max(1, round(found / self._share(0, (entry.next_unit, entry.next_chunk))))

    def _shares(self, number: int) -> tuple[float, float]:
        """Between which shares of the epoch's bytes a window's sequences lie."""
        entry = self.entry(number)
        if self._repacked(number):
            (begin, end), before = self._shares(number - 1), self.entry(number - 1)
            read = len(self._ledger.read(self.corpus, number - 1))
            return begin + (end - begin) * read / before.num_sequences, end
        begin = self._share(entry.epoch, self._start(number))
        return begin, 1.0 if entry.ends_epoch else self._share(entry.epoch, (entry.next_unit, entry.next_chunk))

    def _share(self, epoch: int, place: Place) -> float:
        """Share of the corpus's bytes before a place of an epoch; of its units where sizes are unknown."""
        rank, chunk = place
        if self._sizes is None or self._sizes[0] != epoch:
            order = permutation(len(self.units), self._layout.seed, "units", self.corpus, epoch)
            sizes = np.array([unit.num_bytes for unit in self.units], dtype=np.float64)
            sizes = sizes[order] if sizes.any() else np.ones(len(order))
            self._sizes = epoch, order, np.cumsum(sizes) - sizes, float(sizes.sum())
        _, order, before, total = self._sizes
        if rank == len(order):
            return 1.0
        unit = self.units[order[rank]]
        inside = min(chunk * (unit.chunk_bytes or 0), unit.num_bytes)
        return float(before[rank] + inside) / total

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
        ended = last.ends_epoch and not self._repacked(number)
        return (last.epoch + 1, 0) if ended else (last.epoch, last.window + 1)

    def _repacked(self, number: int) -> tuple[tuple[int, int], ...]:
        """`WindowPlan.repacked` of a window: empty unless a length that begins with it left some of the one before."""
        if not number or not self._ledger.is_cut(self.corpus, number - 1):
            return ()
        length = self.entry(number - 1).sequence_length or self._layout.sequence_length
        return (*self._repacked(number - 1), (length, len(self._ledger.read(self.corpus, number - 1))))

    def _start(self, number: int) -> Place:
        if self._repacked(number):
            return self._start(number - 1)
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

    def _known_chunks(self, number: int) -> list[Chunk]:
        """The chunks of a window of the ledger, if their content is still the same."""
        entry = self.entry(number)
        chunks, _ = self._take(entry.epoch, self._start(number), entry.num_chunks)
        if _checksum(chunks) != entry.checksum:
            sources = sorted({path for chunk in chunks for path in chunk.meta.sources})
            raise DataError(
                f"the text of corpus {self.corpus!r} changed since the run's last checkpoint",
                where=", ".join(sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else ""),
                remedy="restore these files, or start a new run",
            )
        return chunks

    def _plan_of(self, number: int, epoch: int, window: int, chunks: Sequence[Chunk]) -> WindowPlan:
        paths, repacked = tuple(chunk.path for chunk in chunks), self._repacked(number)
        first = self._ledger.read(self.corpus, number - 1).stop if number else 0
        length = self._ledger.sequence_length(self.corpus, first)
        duplicates = None
        if self._layout.filters.drop_duplicates:  # of a window that repacks, those of the first with its documents
            duplicates = self._duplicates(number - len(repacked), window - len(repacked), chunks)
        return WindowPlan(
            self.corpus, epoch, window, paths, duplicates=duplicates, sequence_length=length, repacked=repacked
        )

    def _duplicates(self, number: int, window: int, chunks: Sequence[Chunk]) -> Path:
        """Where it is written which documents of the window came before in its epoch; written if it is not.

        It depends on the epoch's earlier windows, whose checksums therefore name the file; finding it anew takes
        the documents' hashes of their chunks.
        """
        layout, first = self._layout, number - window
        filters = (layout.filters, layout.seed, layout.held_out_ratio)
        checksums = [self.entry(earlier).checksum for earlier in range(first, number)] + [_checksum(chunks)]
        path = self._cache.duplicates_path(duplicates_name(checksums, *filters))
        if stored_array(path) is None:
            at, seen = self._seen
            if not first < at <= number:
                at, seen = first, SeenTexts()
            self._seen = 0, SeenTexts()  # whoever comes after an error half-way begins anew
            for earlier in range(at, number):
                window_duplicates(self._known_chunks(earlier), *filters, seen)
            found = window_duplicates(chunks, *filters, seen)
            self._seen = number + 1, seen
            self._cache.store(path, found)
        return path

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
                raise self._nothing_read()
            if any(window.num_dropped for window in windows):
                raise DataError(
                    "data.filters drops every document of the corpus that is not held out",
                    where=f"data.mixture, corpus {self.corpus!r}",
                    remedy="relax data.filters, or add text",
                )
            raise DataError(
                "every document of the corpus is held out for validation",
                where=f"data.mixture, corpus {self.corpus!r}",
                remedy="lower data.validation.ratio, add text, or set data.validation: null",
            )

    def _nothing_read(self) -> DataError:
        bad = [found for chunk in self.chunks("validation") for found in bad_records(chunk)]
        if not bad:
            return empty_corpus(self.corpus)
        path, first = bad[0]
        return DataError(
            f"corpus {self.corpus!r} holds no text that can be read, of {len(bad)} records none: {first.reason}",
            where=f"{path}, record {first.number} (at {first.start})",
            remedy="convert or repair the file; text must be UTF-8",
        )


def _checksum(chunks: Sequence[Chunk]) -> str:
    return hashlib.blake2b("".join(chunk.meta.checksum for chunk in chunks).encode(), digest_size=16).hexdigest()
