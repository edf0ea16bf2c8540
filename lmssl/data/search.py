"""Which positions hold the documents that contain a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from lmssl.data.cache import text_hash
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
    document: Located
    split: Literal["train", "validation"] | None
    """None: the recipe leaves it out of both."""
    positions: tuple[int, ...]
    """Where the first epoch holds it or parts of it, in order."""


def search(
    stream: SequenceStream,
    text: str,
    *,
    finder: Callable[[str], DocumentFinder],
    limit: int,
    report: Callable[[str], None],
) -> tuple[list[Match], bool]:
    """The first `limit` documents that contain a text, in the order of the sources, and whether there are more.

    The sources are searched, not the tokens. Of the first epoch as much is built as the documents found need.

    Raises:
        DataError: a source cannot be read.
    """
    matches: list[Match] = []
    for corpus in stream.section.mixture:
        units = stream.units(corpus.name)
        if not finder(corpus.name).has_text:
            report(f"corpus {corpus.name!r} consists of tokens: there is no text to search")
            continue
        hits = _documents_with(text, units, stream.section.max_bad_records)
        found = list(islice(hits, limit - len(matches) + 1))
        kept = found[: limit - len(matches)]
        located = finder(corpus.name).find(kept)
        placed = _places(stream, corpus.name, kept)
        matches += [Match(corpus.name, located[source], *placed[source]) for source in kept]
        if len(found) > len(kept):
            return matches, True
    return matches, False


def _documents_with(text: str, units: Iterable[Unit], max_bad_records: int) -> Iterator[Source]:
    for unit in units:
        for chunk in read_chunks(unit, max_bad_records=max_bad_records):
            for document in chunk.documents:
                if text in document.text:
                    path = unit.parts[document.part].path
                    yield Source(path, document.start, document.offset, document.num_bytes, text_hash(document.text))


Place = tuple[Literal["train", "validation"] | None, tuple[int, ...]]


def _places(stream: SequenceStream, corpus: str, sources: Iterable[Source]) -> dict[Source, Place]:
    """The split of each document, and where the first epoch holds it."""
    wanted, placed = set(sources), dict[Source, Place]()
    first = 0
    windows = stream.first_epoch(corpus) if wanted else iter(())
    for entry, window in windows:
        for source, place in _in_window(stream, window, first, wanted):
            placed[source] = place
        first += entry.num_sequences
        if len(placed) == len(wanted):
            break
    return {source: placed.get(source, (None, ())) for source in wanted}


def _in_window(
    stream: SequenceStream, window: Window, first: int, wanted: set[Source]
) -> Iterator[tuple[Source, Place]]:
    """Those of the documents wanted that a window's chunks hold; `first` sequences of the corpus come before it."""
    starts = np.array(sorted({source.start for source in wanted}), dtype=np.int64)
    for number, chunk in enumerate(window.chunks):
        rows = chunk.documents()
        for row in np.flatnonzero(np.isin(rows["start"], starts)).tolist():
            source = source_of(chunk, rows[row])
            if source not in wanted:
                continue
            held_out = is_held_out(rows["text_hash"][row : row + 1], stream.layout.seed, stream.layout.held_out_ratio)
            if held_out[0]:
                yield source, ("validation", ())
                continue
            found = (stream.order.position_of(window.plan.corpus, first + k) for k in window.holders(number, row))
            positions = tuple(sorted(position for position in found if position is not None))
            yield source, ("train" if positions else None, positions)
