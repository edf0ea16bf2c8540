"""Sequences with the origin of each of their segments: file, record and bytes of its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmssl.data.chunk import Chunk
from lmssl.data.locate import DocumentFinder, Located, Source, source_of
from lmssl.data.stream import SequenceStream
from lmssl.data.validation import ValidationSplit
from lmssl.data.window import Piece, Window
from lmssl.errors import DataError
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.offsets import TokenOffsets

_TOGETHER = 64
"""Sequences traced at a time, because neighbours share files: each part of a file is read once for all of them."""


@dataclass(frozen=True, slots=True)
class TracedSegment:
    """Part of a document inside a sequence."""

    start: int
    """Where it starts in the sequence."""
    length: int
    """Tokens, special tokens included."""
    corpus: str
    file: str
    record: int
    """Index of the record in its file."""
    byte_start: int | None
    """Of the record's text in UTF-8 the segment holds bytes `byte_start` to `byte_end`; None: there is no text."""
    byte_end: int | None


@dataclass(frozen=True, slots=True)
class TracedSequence:
    """One sequence; `position` is its index where it is for validation."""

    position: int
    epoch: int | None
    """None: for validation."""
    ids: list[int]
    """Shape [T], padding included."""
    segments: list[TracedSegment]
    num_padding_tokens: int


@dataclass(frozen=True)
class _Asked:
    position: int
    epoch: int | None
    window: Window
    index: int


class Tracer:
    """Traces sequences of a stream back to the files that its corpora are read from."""

    def __init__(self, stream: SequenceStream, tokenizer: Tokenizer) -> None:
        self._stream = stream
        self._offsets = TokenOffsets(tokenizer)
        self._finders: dict[str, DocumentFinder] = {}

    def sequences(self, positions: Iterable[int]) -> Iterator[TracedSequence]:
        """The training sequences at some positions.

        Raises:
            DataError: a source cannot be read, or is no longer what was tokenized.
        """
        windows = ((position, *self._stream.window_at(position)) for position in positions)
        asked = (_Asked(position, window.plan.epoch, window, index) for position, window, index in windows)
        return self._in_batches(asked)

    def held_out(self, indices: Sequence[int]) -> Iterator[TracedSequence]:
        """The held-out sequences at some indices, counted over the corpora's splits in the order of the mixture.

        Raises:
            DataError: there are not that many; a source cannot be read, or is no longer what was tokenized.
        """
        return self._for_validation(self._stream.validation(), indices, "held-out sequence", "data.validation")

    def in_set(self, name: str, indices: Sequence[int]) -> Iterator[TracedSequence]:
        """The sequences at some indices of one of `validation.sets`.

        Raises:
            DataError: as for `held_out`; or a set holds no text.
        """
        found = [split for split in self._stream.validation_sets() if split.corpus == name]
        return self._for_validation(found, indices, f"sequence of {name!r}", "data.validation.sets")

    def finder(self, corpus: str) -> DocumentFinder:
        """What finds documents of a corpus or of a validation set in its files."""
        if corpus not in self._finders:
            self._finders[corpus] = DocumentFinder(self._stream.units(corpus))
        return self._finders[corpus]

    def _for_validation(
        self, splits: Iterable[ValidationSplit], indices: Sequence[int], what: str, where: str
    ) -> Iterator[TracedSequence]:
        places = [(split.window, i) for split in splits for i in range(split.num_sequences)]
        wrong = next((index for index in indices if index >= len(places)), None)
        if wrong is not None:
            raise DataError(
                f"there is no {what} {wrong}; there are {len(places)}, counted from 0",
                where=where,
                remedy=f"ask for at most {len(places) - 1}, or raise data.validation.tokens"
                if places
                else "give the recipe a data.validation",
            )
        return self._in_batches(_Asked(index, None, *places[index]) for index in indices)

    def _in_batches(self, asked: Iterator[_Asked]) -> Iterator[TracedSequence]:
        while batch := list(islice(asked, _TOGETHER)):
            documents = _Documents(self, self._offsets)
            pieces = [one.window.pieces(one.index) for one in batch]
            for one, held in zip(batch, pieces, strict=True):
                documents.want(one.window, held)
            documents.read()
            for one, held in zip(batch, pieces, strict=True):
                yield TracedSequence(
                    position=one.position,
                    epoch=one.epoch,
                    ids=one.window.gather(one.index).ids_T.tolist(),
                    segments=[documents.segment(one.window, piece) for piece in held],
                    num_padding_tokens=one.window.layout.sequence_length - sum(piece.length for piece in held),
                )


class _Documents:
    """The documents that some sequences hold."""

    def __init__(self, tracer: Tracer, offsets: TokenOffsets) -> None:
        self._tracer = tracer
        self._offsets = offsets
        self._rows: dict[Path, npt.NDArray[Any]] = {}
        self._wanted: dict[str, set[Source]] = {}
        self._located: dict[tuple[str, Source], Located] = {}
        self._bounds: dict[tuple[str, Source], npt.NDArray[np.int64]] = {}

    def want(self, window: Window, pieces: Iterable[Piece]) -> None:
        """Note the documents of some segments of a window."""
        wanted = self._wanted.setdefault(window.plan.corpus, set())
        for piece in pieces:
            chunk, rows = self._open(window, piece)
            wanted.add(source_of(chunk, rows[piece.row]))

    def read(self) -> None:
        """Find what was noted."""
        for corpus, sources in self._wanted.items():
            finder = self._tracer.finder(corpus)
            if finder.has_text:
                self._located.update({(corpus, source): found for source, found in finder.find(sources).items()})

    def segment(self, window: Window, piece: Piece) -> TracedSegment:
        """The origin of a segment."""
        corpus = window.plan.corpus
        chunk, rows = self._open(window, piece)
        source = source_of(chunk, rows[piece.row])
        located = self._located.get((corpus, source))
        if located is None:
            record = int(rows[piece.row]["record"])
            return TracedSegment(piece.start, piece.length, corpus, source.path, record, None, None)
        bounds = self._bounds.get((corpus, source))
        if bounds is None:
            bounds = self._bounds[corpus, source] = self._encode(chunk, piece.row, located)
        begin, end = (located.byte_start + int(bounds[token]) for token in (piece.first, piece.stop))
        return TracedSegment(piece.start, piece.length, corpus, located.file, located.record, begin, end)

    def _open(self, window: Window, piece: Piece) -> tuple[Chunk, npt.NDArray[Any]]:
        chunk = window.chunks[piece.chunk]
        if chunk.path not in self._rows:
            self._rows[chunk.path] = chunk.documents()
        return chunk, self._rows[chunk.path]

    def _encode(self, chunk: Chunk, row: int, located: Located) -> npt.NDArray[np.int64]:
        encoded = self._offsets.encode(located.text)
        ends = chunk.ends()
        cached = chunk.tokens()[int(ends[row - 1]) if row else 0 : int(ends[row])]
        if not np.array_equal(cached, encoded.ids):
            raise DataError(
                "the text of a document does not give the ids that are cached: its source or the tokenizer changed",
                where=f"{located.file}, record {located.record}; cached in {chunk.path}",
                remedy="remove that folder, and the chunk is built again from the text as it is now",
            )
        return encoded.bounds
