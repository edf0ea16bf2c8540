"""Chunks -> a window of packed sequences.

A window is a pure function of its plan and the layout, so loader workers rebuild it instead of receiving it.
Shapes: T tokens of a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmssl.data.cache import Chunk, read_chunk
from lmssl.data.order import permutation
from lmssl.data.pack import PACKINGS, Packing
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection
from lmssl.tokenizer.load import Tokenizer

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How documents become sequences."""

    sequence_length: int
    packing: str
    bos_id: int | None
    """Put before each document; None: nothing is."""
    eos_id: int | None
    """Put after each document; None: nothing is."""
    pad_id: int
    """Fills what no segment does; never a target."""
    seed: int
    held_out_ratio: float

    @classmethod
    def of(cls, section: DataSection, tokenizer: Tokenizer, seed: int) -> Layout:
        """The layout a recipe asks for.

        Raises:
            DataError: it asks for a special token that the tokenizer lacks.
        """
        for role, wanted, token in (("bos", section.bos, tokenizer.bos_id), ("eos", section.eos, tokenizer.eos_id)):
            if wanted and token is None:
                raise DataError(
                    f"data.{role} is on, and the tokenizer has no {role} token",
                    where=str(tokenizer.path),
                    remedy=f"set data.{role}: false, or use a tokenizer whose config names a {role}_token",
                )
        fillers = (tokenizer.pad_id, tokenizer.eos_id, 0)
        return cls(
            sequence_length=section.sequence_length,
            packing=section.packing,
            bos_id=tokenizer.bos_id if section.bos else None,
            eos_id=tokenizer.eos_id if section.eos else None,
            pad_id=next(token for token in fillers if token is not None),
            seed=seed,
            held_out_ratio=section.validation.ratio if section.validation else 0.0,
        )


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


class Row(NamedTuple):
    """One sequence; shape [T] each."""

    ids_T: IntArray
    segments_T: npt.NDArray[np.int32]
    """1, 2, ... per segment, 0 for padding."""
    offsets_T: IntArray
    """Index within the segment."""
    num_bytes: float
    """Bytes of its text; of a cut document, in proportion."""


class Window:
    """The packed and shuffled sequences of some chunks."""

    def __init__(self, plan: WindowPlan, layout: Layout) -> None:
        self.plan = plan
        self.layout = layout
        self._chunks = [_open(path) for path in plan.chunks]
        self._tokens = [chunk.tokens() for chunk in self._chunks]
        self._select()
        self.packing: Packing = PACKINGS[layout.packing](self._lengths, layout.sequence_length)
        if plan.max_held_out_tokens is None:
            key = (layout.seed, "sequences", plan.corpus, plan.epoch, plan.window)
            self._sequence_at = permutation(self.packing.num_sequences, *key)
        else:
            self._sequence_at = np.arange(self.packing.num_sequences)
        self._offsets_T = np.arange(layout.sequence_length)

    @property
    def num_sequences(self) -> int:
        """Sequences of the window."""
        return self.packing.num_sequences

    @property
    def num_documents(self) -> int:
        """Documents in the window's sequences."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the window's sequences, special tokens included, padding not."""
        return int(self._lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of text in the window's sequences."""
        return round(float(self._num_bytes.sum()))

    def gather(self, index: int) -> Row:
        """The index-th sequence."""
        length = self.layout.sequence_length
        row = Row(np.empty(length, np.int64), np.empty(length, np.int32), np.empty(length, np.int64), 0.0)
        return row._replace(num_bytes=self.gather_into(index, row.ids_T, row.segments_T, row.offsets_T))

    def gather_into(self, index: int, ids_T: IntArray, segments_T: npt.NDArray[np.int32], offsets_T: IntArray) -> float:
        """Write the index-th sequence into three arrays of shape [T]; its bytes of text are returned."""
        packing, layout, sequence = self.packing, self.layout, self._sequence_at[index]
        segments = slice(packing.offsets[sequence], packing.offsets[sequence + 1])
        documents, starts, lengths = packing.documents[segments], packing.starts[segments], packing.lengths[segments]
        ends, stops = np.cumsum(lengths), starts + lengths
        begins, used = ends - lengths, int(ends[-1])
        segments_T[:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        offsets_T[:used] = self._offsets_T[:used] - np.repeat(begins, lengths)
        # Tokens of a document count from its bos token, where there is one; the cache holds neither bos nor eos.
        bos = int(layout.bos_id is not None)
        content_ends = bos + self._contents[documents]
        low, high = np.maximum(starts, bos), np.minimum(stops, content_ends)
        shift = self._begins[documents] - bos
        places = (self._chunk_of[documents], shift + low, shift + high, begins + low - starts)
        for chunk, first, last, to in zip(*(place.tolist() for place in places), strict=True):
            ids_T[to : to + last - first] = self._tokens[chunk][first:last]
        if layout.bos_id is not None:
            ids_T[begins[starts == 0]] = layout.bos_id
        if layout.eos_id is not None:
            ids_T[ends[stops > content_ends] - 1] = layout.eos_id
        ids_T[used:] = layout.pad_id
        segments_T[used:] = 0
        offsets_T[used:] = 0
        return float((self._num_bytes[documents] * (lengths / self._lengths[documents])).sum())

    def _select(self) -> None:
        """The documents of this side of the split: chunk, first token, tokens, text bytes; shape [documents] each."""
        layout, limit = self.layout, self.plan.max_held_out_tokens
        columns: list[tuple[Any, ...]] = []
        for number, chunk in enumerate(self._chunks):
            ends, rows = chunk.ends().astype(np.int64), chunk.documents()
            begins = np.append(0, ends[:-1]) if len(ends) else ends
            kept = is_held_out(rows["text_hash"], layout.seed, layout.held_out_ratio) == (limit is not None)
            columns.append((np.full(kept.sum(), number), begins[kept], (ends - begins)[kept], rows["num_bytes"][kept]))
        empty = (np.empty(0, np.int64),) * 4
        parts = [np.concatenate(column) for column in zip(*columns, empty, strict=True)]
        self._chunk_of, self._begins, self._contents, num_bytes = parts
        self._num_bytes = num_bytes.astype(np.float64)
        self._lengths = self._contents + (layout.bos_id is not None) + (layout.eos_id is not None)
        if limit is not None:
            self._shorten(limit)

    def _shorten(self, limit: int) -> None:
        """Keep the first `limit` tokens."""
        before = np.cumsum(self._lengths) - self._lengths
        count = int(np.searchsorted(before, limit))
        kept = np.minimum(self._lengths[:count], limit - before[:count])
        self._num_bytes = self._num_bytes[:count] * kept / np.maximum(1, self._lengths[:count])
        self._lengths = kept


class OpenWindows:
    """The windows used last, opened when asked for."""

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout = layout
        self._size = size
        self._windows: OrderedDict[WindowPlan, Window] = OrderedDict()

    def get(self, plan: WindowPlan) -> Window:
        """The window of a plan."""
        window = self._windows.pop(plan, None) or Window(plan, self.layout)
        self._windows[plan] = window
        while len(self._windows) > self._size:
            self._windows.popitem(last=False)
        return window


def is_held_out(text_hashes: npt.NDArray[np.uint64], seed: int, ratio: float) -> npt.NDArray[np.bool_]:
    """Which documents belong to the validation split; equal texts share a side."""
    mixed = _mix(text_hashes ^ _mix(np.array([seed % (1 << 64)], dtype=np.uint64)))
    return (mixed >> np.uint64(11)) < ratio * 2.0**53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of splitmix64 (Steele, Lea & Flood 2014).
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _open(path: Path) -> Chunk:
    chunk = read_chunk(path)
    if chunk is None:
        raise DataError(
            "a chunk of the token cache was removed or damaged during the run",
            where=str(path),
            remedy="run the same command again: the chunk is rebuilt and the run continues from its last checkpoint",
        )
    return chunk
