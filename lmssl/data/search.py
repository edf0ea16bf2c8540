"""Which positions hold the documents that contain a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lmssl.data.chunk import utf8_hash
from lmssl.data.corpus import read_chunks
from lmssl.data.filters import is_held_out
from lmssl.data.locate import DocumentFinder, Located, Source, source_of
from lmssl.data.stream import SequenceStream
from lmssl.data.units import Unit
from lmssl.data.window import Window


@dataclass(frozen=True, slots=True)
class Match:
    """A document that contains the text."""

    corpus: str
    """Or the validation set."""
    document: Located
    split: str | None
    """`train`, `validation`, or the name of a validation set; None: no sequence holds it."""
    positions: tuple[int, ...]
    """Where the first epoch, or the set, holds it or parts of it, in order; none for `validation`."""
    epoch: int | None
    """Of the positions; None: they are a set's, or there are none."""


def search(
    stream: SequenceStream,
    text: str,
    *,
    finder: Callable[[str], DocumentFinder],
    limit: int,
    report: Callable[[str], None],
) -> tuple[list[Match], bool]:
    """The first `limit` documents that contain a text, in the order of the sources, and whether there are more.

    The sources are searched, not the tokens: those of the corpora, then those of the validation sets. Of the first
    epoch as much is built as the documents found need.

    Raises:
        DataError: a source cannot be read.
    """
    matches: list[Match] = []
    validation = stream.section.validation
    places: dict[str, _Placer] = {corpus.name: _places for corpus in stream.section.mixture}
    places |= {corpus.name: _places_in_set for corpus in (validation.sets if validation is not None else ())}
    for corpus, place in places.items():
        if not finder(corpus).has_text:
            report(f"corpus {corpus!r} consists of tokens: there is no text to search")
            continue
        hits = _documents_with(text, stream.units(corpus), stream.section.max_bad_records)
        found = list(islice(hits, limit - len(matches) + 1))
        kept = found[: limit - len(matches)]
        located = finder(corpus).find(kept)
        placed = place(stream, corpus, kept)
        matches += [Match(corpus, located[source], *placed.get(source, _NOWHERE)) for source in kept]
        if len(found) > len(kept):
            return matches, True
    return matches, False


def _documents_with(text: str, units: Iterable[Unit], max_bad_records: int) -> Iterator[Source]:
    raw = text.encode(errors="surrogateescape")  # of an argument that is not UTF-8, its bytes: no text holds them
    for unit in units:
        for chunk in read_chunks(unit, max_bad_records=max_bad_records):
            for document in chunk.documents:
                if raw in document.raw:
                    path = unit.parts[document.part].path
                    yield Source(path, document.start, document.offset, document.num_bytes, utf8_hash(document.raw))


Place = tuple[str | None, tuple[int, ...], int | None]
"""Split, positions and their epoch, as `Match` has them."""
_NOWHERE: Place = None, (), None
_Placer = Callable[[SequenceStream, str, Iterable[Source]], dict[Source, Place]]


def _places(stream: SequenceStream, corpus: str, sources: Iterable[Source]) -> dict[Source, Place]:
    """The split of each document, and where the first epoch holds it."""
    wanted, placed = set(sources), dict[Source, Place]()
    windows = stream.first_epoch(corpus) if wanted else iter(())
    for held, window in windows:
        for source, (split, positions, epoch) in _in_window(stream, window, held, wanted):
            earlier = placed[source][1] if source in placed else ()  # of a document that was partly repacked
            placed[source] = split, tuple(sorted((*earlier, *positions))), epoch
        if len(placed) == len(wanted) and len(held) == window.num_sequences:
            break
    return {source: place if place[0] == "validation" or place[1] else _NOWHERE for source, place in placed.items()}


def _places_in_set(stream: SequenceStream, name: str, sources: Iterable[Source]) -> dict[Source, Place]:
    """Where a validation set holds each document; those beyond its budget of tokens are in none."""
    wanted, placed = set(sources), dict[Source, Place]()
    for split in stream.validation_sets() if wanted else ():
        if split.corpus == name:
            for source, number, row in _rows_of(split.window, wanted):
                positions = tuple(split.window.holders(number, row))
                placed[source] = (name, positions, None) if positions else _NOWHERE
    return placed


def _in_window(
    stream: SequenceStream, window: Window, held: range, wanted: set[Source]
) -> Iterator[tuple[Source, Place]]:
    """Those of the documents wanted that a window's chunks hold; of the corpus's sequences, `held` are in it."""
    for source, number, row in _rows_of(window, wanted):
        hashes = np.array([source.hash], dtype=np.uint64)
        if is_held_out(hashes, stream.layout.seed, stream.layout.held_out_ratio)[0]:
            yield source, ("validation", (), None)
            continue
        indices = (k for k in window.holders(number, row) if k < len(held))
        found = (stream.order.position_of(window.plan.corpus, held[k]) for k in indices)
        yield source, ("train", tuple(position for position in found if position is not None), 0)


def _rows_of(window: Window, wanted: set[Source]) -> Iterator[tuple[Source, int, int]]:
    """Those of the documents wanted that a window's chunks hold, each with its chunk and row."""
    starts = np.array(sorted({source.start for source in wanted}), dtype=np.int64)
    for number, chunk in enumerate(window.chunks):
        rows = chunk.documents()
        for row in np.flatnonzero(np.isin(rows["start"], starts)).tolist():
            source = source_of(chunk, rows[row])
            if source in wanted:
                yield source, number, row
