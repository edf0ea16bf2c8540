"""Chunks -> a window of packed sequences.

A window is a pure function of its plan and the layout, so loader workers rebuild it instead of receiving it.
Shapes: T tokens of a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmssl.data.chunk import Chunk, read_chunk
from lmssl.data.fill_in_the_middle import NUM_SENTINELS, FillInTheMiddle, Middles, document_ids
from lmssl.data.filters import Candidates, Dropped, documents_of, read_duplicates, training_documents
from lmssl.data.layout import Layout
from lmssl.data.order import permutation
from lmssl.data.pack import PACKINGS, Packing
from lmssl.data.repack import Runs
from lmssl.errors import DataError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sequence is: by corpus, epoch and window, and which of the window's."""

    corpus: str
    epoch: int
    window: int
    index: int


@dataclass(frozen=True)
class WindowPlan:
    """Everything a window is made of, small enough to send to a worker."""

    corpus: str
    epoch: int
    window: int
    chunks: tuple[Path, ...] = field(hash=False)
    """Left out of the hash, which every row needs; equality compares them."""
    max_held_out_tokens: int | None = None
    """None: the documents that are trained on; else the held-out ones, up to so many tokens."""
    duplicates: Path | None = field(default=None, hash=False)
    """Which documents are left out as duplicates, see `filters.read_duplicates`; None: none."""
    sequence_length: int | None = None
    """None: the layout's; else that of a later stage."""
    repacked: tuple[tuple[int, int], ...] = ()
    """Of a window that holds what the one before left when a stage with another length began: (sequence length, number
    of sequences read) of each packing of its documents before this one."""


class Row(NamedTuple):
    """One sequence; shape [T] each."""

    ids_T: IntArray
    segments_T: npt.NDArray[np.int32]
    """1, 2, ... per segment, 0 for padding."""
    offsets_T: IntArray
    """Index within the segment."""
    num_bytes: float
    """Bytes of its text; of a cut document, in proportion."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Several sequences; shapes [B, T], and [B] for the bytes. See `Row`."""

    ids_BT: IntArray
    segments_BT: npt.NDArray[np.int32]
    num_bytes_B: npt.NDArray[np.float64]
    runs: IntArray
    """Shape [2, runs]: lengths and numbers of the segments of all rows, padding among them."""

    @cached_property
    def offsets_BT(self) -> IntArray:
        """Made when it is asked for, because that takes as long as the segments."""
        lengths, numbers = self.runs
        offsets = np.arange(self.segments_BT.size)
        offsets -= np.repeat(np.cumsum(lengths) - lengths, lengths)
        if not numbers.all():
            offsets[self.segments_BT.ravel() == 0] = 0
        return offsets.reshape(self.segments_BT.shape)


class Piece(NamedTuple):
    """A segment of a sequence and what it holds of which document; bounds in tokens."""

    start: int
    """Where the segment starts in the sequence."""
    length: int
    """Special tokens included."""
    chunk: int
    """Index into the window's chunks."""
    row: int
    """Index into the chunk's documents."""
    first: int
    """Of the document's own tokens, without special tokens, the segment holds `first` to `stop`.

    Of a document rearranged for filling in the middle it holds some of them, from the first to the last."""
    stop: int


class Window:
    """The packed and shuffled sequences of some chunks."""

    def __init__(self, plan: WindowPlan, layout: Layout) -> None:
        self.plan = plan
        length = plan.sequence_length
        self.layout = layout = layout if length is None else replace(layout, sequence_length=length)
        self._chunks = [_open(path) for path in plan.chunks]
        self._tokens = [chunk.tokens() for chunk in self._chunks]
        self._views = [tokens.data for tokens in self._tokens]
        self.dropped = Dropped()
        self._middles: Middles | None = None
        self._select()
        packing = self._pack()
        self.packing = packing.with_starts_first() if layout.align_starts else packing
        self._sequence_at = self._permutation(packing.num_sequences, plan.window)
        self._tabulate()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of its plan, opened."""
        return tuple(self._chunks)

    @property
    def num_sequences(self) -> int:
        """Sequences of the window."""
        return self.packing.num_sequences

    @property
    def num_documents(self) -> int:
        """Documents in the window's sequences."""
        return len(np.unique(self.packing.documents)) if self.plan.repacked else len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the window's sequences, special tokens included, padding not."""
        return int(self.packing.lengths.sum())

    @property
    def num_document_tokens(self) -> int:
        """Those of `num_tokens` that documents have however they are packed: all but cls and sep."""
        return int(self._lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of text in the window's sequences."""
        return round(float((self._bytes_of if self.plan.repacked else self._num_bytes).sum()))

    @cached_property
    def table_bytes(self) -> int:
        """Memory of what it knows of documents and segments; tokens are mapped, and not in it."""
        return sum(a.nbytes for part in (self, self.packing) for a in vars(part).values() if isinstance(a, np.ndarray))

    def gather(self, index: int) -> Row:
        """The index-th sequence."""
        rows = gather_rows([(self, index)], self.layout)
        return Row(rows.ids_BT[0], rows.segments_BT[0], rows.offsets_BT[0], float(rows.num_bytes_B[0]))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tokens of its chunks."""
        return self._tokens[0].dtype if self._tokens else np.dtype(np.int64)

    def write_ids(self, index: int, ids_T: npt.NDArray[Any], view: memoryview) -> tuple[IntArray, float]:
        """Write the tokens of the index-th sequence into an array; returned: its `Row.segments_T`, run by run, bytes.

        The runs have shape [2, runs]: how many tokens, and which segment. The last is of padding, where there is some.

        Args:
            ids_T: of `dtype`; where special tokens at the ends of documents or segments go, they stand already.
            view: of `ids_T`.
        """
        sequence, layout, tokens = self._sequence_at.item(index), self.layout, self._views
        first, stop, first_run, stop_run, num_padding = self._spans[sequence].tolist()
        segments = slice(first, stop)
        if self._middles is None:
            # Slices of views cost a third of slices of arrays, and for a few hundred tokens less than index arrays.
            for chunk, begin, end, to, to_end in self._table[segments].tolist():
                view[to:to_end] = tokens[chunk][begin:end]
        else:
            self._copy_rearranged(self._middles, segments, ids_T)
        if layout.bos_id is not None:
            ids_T[self._bos_places(segments)] = layout.bos_id
        if layout.cls_id is not None:
            ids_T[self._table[segments, 3] - 1] = layout.cls_id
        if num_padding:
            ids_T[-num_padding:] = layout.pad_id
        return self._runs[:, first_run:stop_run], self._bytes_of.item(sequence)

    def _pack(self) -> Packing:
        """The documents in sequences; of a window that repacks, what the packings before this one left of them."""
        layout, repacked = self.layout, self.plan.repacked
        pack, overhead = PACKINGS[layout.packing], layout.overhead_tokens
        if not repacked:
            return pack(self._lengths, layout.sequence_length, overhead)
        runs = Runs.whole(self._lengths)
        for number, (length, num_read) in enumerate(repacked, self.plan.window - len(repacked)):
            packing = runs.pack(pack, len(self._lengths), length, overhead)
            order = self._permutation(packing.num_sequences, number)
            runs = Runs.unread(packing, order[num_read:], overhead)
        self.dropped = Dropped()  # they are counted with the first of these windows
        return runs.pack(pack, len(self._lengths), layout.sequence_length, overhead)

    def _permutation(self, num_sequences: int, window: int) -> IntArray:
        """The order in which the sequences of a window are read; held-out ones stay as they are packed."""
        plan = self.plan
        if plan.max_held_out_tokens is not None:
            return np.arange(num_sequences)
        return permutation(num_sequences, self.layout.seed, "sequences", plan.corpus, plan.epoch, window)

    def _tabulate(self) -> None:
        """Of every segment: of which chunk what is copied (first, stop) to where in the sequence (first, stop)."""
        packing, layout = self.packing, self.layout
        documents, starts, lengths = packing.documents, packing.starts, packing.lengths - layout.overhead_tokens
        ends = np.cumsum(packing.lengths)
        before = np.append(0, ends)[packing.offsets[:-1]]
        ends = ends - np.repeat(before, np.diff(packing.offsets))
        # Tokens of a document count from its bos token, where there is one; the cache holds neither bos nor eos.
        bos = int(layout.bos_id is not None)
        content_ends = bos + self._contents[documents]
        low, high = np.maximum(starts, bos), np.minimum(starts + lengths, content_ends)
        shift = self._begins[documents] - bos
        places = ends - packing.lengths + (layout.cls_id is not None) + low - starts
        columns = (self._chunk_of[documents], shift + low, shift + high, places, places + high - low)
        self._table = np.stack(columns, axis=1)
        shares = self._num_bytes[documents] * (lengths / self._lengths[documents])
        self._bytes_of = np.bincount(packing.sequences, shares, packing.num_sequences)
        self._runs, runs, padding = packing.runs()
        self._spans = np.stack([packing.offsets[:-1], packing.offsets[1:], runs[:-1], runs[1:], padding], axis=1)

    def _bos_places(self, segments: slice) -> IntArray:
        """Where in their sequence some segments that start a document begin: one token before their content."""
        places: IntArray = self._table[segments, 3][self.packing.starts[segments] == 0] - 1
        return places

    def _copy_rearranged(self, middles: Middles, segments: slice, ids_T: IntArray) -> None:
        """Write the content of one sequence among whose documents some are filled in the middle."""
        documents = self.packing.documents[segments]
        begins = self._begins[documents]
        chunk_of, firsts, lasts, places = self._table[segments, :4].T
        which, (firsts, lasts, places) = middles.write(documents, (firsts - begins, lasts - begins, places), ids_T)
        columns = (chunk_of[which], begins[which] + firsts, begins[which] + lasts, places)
        for chunk, first, last, to in np.stack(columns, axis=1).tolist():
            ids_T[to : to + last - first] = self._tokens[chunk][first:last]

    def pieces(self, index: int) -> list[Piece]:
        """The segments of the index-th sequence, in order."""
        packing, sequence = self.packing, self._sequence_at[index]
        segments = slice(packing.offsets[sequence], packing.offsets[sequence + 1])
        documents, starts, lengths = packing.documents[segments], packing.starts[segments], packing.lengths[segments]
        bos, contents = int(self.layout.bos_id is not None), self._contents[documents]
        first = np.clip(starts - bos, 0, contents)
        stop = np.clip(starts + lengths - self.layout.overhead_tokens - bos, 0, contents)
        if self._middles is not None:
            first, stop = self._middles.spans(documents, first, stop)
        begins = np.cumsum(lengths) - lengths
        columns = (begins, lengths, self._chunk_of[documents], self._rows[documents], first, stop)
        return [Piece(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def holders(self, chunk: int, row: int) -> list[int]:
        """The sequences that hold a document of a chunk, or part of it, in order; empty where it is left out."""
        count = len(self._lengths)
        document = np.flatnonzero((self._chunk_of[:count] == chunk) & (self._rows[:count] == row))
        segments = np.flatnonzero(np.isin(self.packing.documents, document))
        sequences = np.searchsorted(self.packing.offsets, segments, side="right") - 1
        return [int(index) for index in np.flatnonzero(np.isin(self._sequence_at, sequences))]

    def _select(self) -> None:
        """The documents of this side of the split: chunk, first token, tokens, text bytes; shape [documents] each."""
        layout, limit = self.layout, self.plan.max_held_out_tokens
        found = self._candidates()
        columns: list[tuple[Any, ...]] = []
        for number, candidates in enumerate(found):
            kept = candidates.kept
            places = np.full(kept.sum(), number), np.flatnonzero(kept)
            columns.append(
                (*places, candidates.begins[kept], candidates.lengths[kept], candidates.rows["num_bytes"][kept])
            )
        empty = (np.empty(0, np.int64),) * 5
        parts = [np.concatenate(column) for column in zip(*columns, empty, strict=True)]
        self._chunk_of, self._rows, self._begins, self._contents, num_bytes = parts
        self._num_bytes = num_bytes.astype(np.float64)
        if limit is None and layout.fill_in_the_middle is not None:
            self._rearrange(layout.fill_in_the_middle, found)
        self._lengths = self._contents + (layout.bos_id is not None) + (layout.eos_id is not None)
        if limit is not None:
            self._shorten(limit)

    def _candidates(self) -> list[Candidates]:
        """The documents of this side of the split, filtered where they are trained on."""
        layout, split = self.layout, (self.layout.seed, self.layout.held_out_ratio)
        if self.plan.max_held_out_tokens is not None:
            return [documents_of(chunk, *split, held_out=True) for chunk in self._chunks]
        found = [training_documents(chunk, layout.filters, *split) for chunk in self._chunks]
        self.dropped = sum((candidates.dropped for candidates in found), Dropped())
        if self.plan.duplicates is not None:
            duplicates = read_duplicates(self.plan.duplicates)
            self.dropped = replace(self.dropped, num_dropped_duplicates=len(duplicates))
            ends = np.cumsum([0] + [len(candidates.kept) for candidates in found])
            for candidates, begin, end in zip(found, ends, ends[1:], strict=False):
                first, last = np.searchsorted(duplicates, [begin, end])
                candidates.kept[duplicates[first:last] - begin] = False
        return found

    def _rearrange(self, transform: FillInTheMiddle, found: list[Candidates]) -> None:
        """Choose the documents to fill in the middle of; they become longer by the sentinels."""
        ids = [document_ids(candidates.rows[candidates.kept]) for candidates in found]
        documents = np.concatenate([np.empty(0, np.uint64), *ids])
        self._middles = Middles(transform, self.layout.seed, self.plan.epoch, documents, self._contents)
        self._contents = self._contents + NUM_SENTINELS * self._middles.chosen

    def _shorten(self, limit: int) -> None:
        """Keep the first `limit` tokens of documents."""
        before = np.cumsum(self._lengths) - self._lengths
        count = int(np.searchsorted(before, limit))
        kept = np.minimum(self._lengths[:count], limit - before[:count])
        self._num_bytes = self._num_bytes[:count] * kept / np.maximum(1, self._lengths[:count])
        self._lengths = kept


class OpenWindows:
    """The windows used last, opened when asked for: so many, and more while their tables take no more than so much."""

    def __init__(self, layout: Layout, size: int, table_bytes: int = 0) -> None:
        self.layout = layout
        self._size = size
        self._left_bytes = table_bytes
        self._windows: OrderedDict[WindowPlan, Window] = OrderedDict()

    def get(self, plan: WindowPlan) -> Window:
        """The window of a plan."""
        window = self._windows.pop(plan, None)
        if window is None:
            window = Window(plan, self.layout)
            self._left_bytes -= window.table_bytes
        self._windows[plan] = window
        while len(self._windows) > self._size and self._left_bytes < 0:
            self._left_bytes += self._windows.popitem(last=False)[1].table_bytes
        return window


def gather_rows(places: Sequence[tuple[Window, int] | None], layout: Layout) -> Rows:
    """Sequences of windows, by index; None: a row of padding. Many at once cost less than one by one."""
    shape = (len(places), layout.sequence_length)
    num_bytes_B = np.zeros(len(places))
    # Copied as they are stored, and made wider all at once.
    stored_BT = np.empty(shape, next((place[0].dtype for place in places if place is not None), np.dtype(np.int64)))
    last_id = layout.eos_id if layout.sep_id is None else layout.sep_id
    stored_BT.fill(layout.pad_id if last_id is None else last_id)  # all but the ends of documents is written over
    view, empty = stored_BT.reshape(-1).data, np.array([[layout.sequence_length], [0]])
    runs: list[IntArray] = []
    for row, place in enumerate(places):
        if place is None:
            stored_BT[row] = layout.pad_id
            runs.append(empty)
        else:
            window, index = place
            first = row * layout.sequence_length
            found, num_bytes_B[row] = window.write_ids(index, stored_BT[row], view[first : first + shape[1]])
            runs.append(found)
    joined = np.concatenate(runs, axis=1) if runs else empty[:, :0]
    segments = np.repeat(joined[1].astype(np.int32), joined[0])
    return Rows(stored_BT.astype(np.int64), segments.reshape(shape), num_bytes_B, joined)


def _open(path: Path) -> Chunk:
    chunk = read_chunk(path)
    if chunk is None:
        raise DataError(
            "a chunk of the token cache was removed or damaged during the run",
            where=str(path),
            remedy="run the same command again: the chunk is rebuilt and the run continues from its last checkpoint",
        )
    return chunk
