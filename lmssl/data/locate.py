"""Back from documents of the cache to the records they were read from.

A document's row holds the path of its source and where its record starts there. Reading that part of the source
again gives the text; the records before the part give its index in the whole file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmssl.data.archive import open_bytes
from lmssl.data.chunk import Chunk, text_hash
from lmssl.data.parquet_files import row_starts
from lmssl.data.readers import read_part
from lmssl.data.records import Format, Part, Record, changed
from lmssl.data.units import Unit
from lmssl.errors import DataError

_BOM = b"\xef\xbb\xbf"
_WITH_TEXT = frozenset({"text", "jsonl", "parquet", "datasets", "python_docs"})
_BY_ROW = ("parquet", "datasets")


class Source(NamedTuple):
    """A document as the cache knows it."""

    path: str
    start: int
    """Where its record starts in the file, see `Record.start`."""
    offset: int
    """The byte of the record's text at which the document starts."""
    num_bytes: int
    hash: int
    """Of its text."""


@dataclass(frozen=True, slots=True)
class Located:
    """A document in its source."""

    file: str
    record: int
    """Index of the record in its file, unreadable ones counted; 0 where the file is the record."""
    byte_start: int
    """The byte of the record's text at which the document starts."""
    text: str
    num_bytes: int

    @property
    def byte_end(self) -> int:
        """The byte of the record's text at which the document ends."""
        return self.byte_start + self.num_bytes


def source_of(chunk: Chunk, row: Any) -> Source:
    """The source of a document from its row of `documents.npy`."""
    path = chunk.meta.sources[int(row["part"])]
    return Source(path, int(row["start"]), int(row["offset"]), int(row["num_bytes"]), int(row["text_hash"]))


class DocumentFinder:
    """Finds documents of one corpus in its files; remembers how many records each part of a file holds."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._form = units[0].form
        parts: dict[str, list[Part]] = defaultdict(list)
        for unit in units:
            for part in unit.parts:
                parts[part.path].append(part)
        self._parts = {path: sorted(found, key=lambda part: part.start) for path, found in parts.items()}
        self._firsts: dict[str, list[int]] = {}
        self._counts: dict[Part, int] = {}
        self._lengths: dict[tuple[str, int], int] = {}

    @property
    def has_text(self) -> bool:
        """Whether the corpus consists of text; ready-made tokens have none."""
        return self._form.kind in _WITH_TEXT

    def find(self, sources: Iterable[Source]) -> dict[Source, Located]:
        """The documents in their files; each part of a file is read at most once.

        Raises:
            DataError: a file is missing, unreadable or no longer holds the document.
        """
        by_path: dict[str, dict[int, list[Source]]] = defaultdict(lambda: defaultdict(list))
        for source in set(sources):
            by_path[source.path][source.start].append(source)
        found: dict[Source, Located] = {}
        for path, wanted in by_path.items():
            if path not in self._parts:
                raise changed(path)
            for number, record in self._records(path, set(wanted)):
                raw = record.raw
                for source in wanted[record.start]:
                    found[source] = self._located(source, number, record, raw)
        return found

    def _records(self, path: str, starts: set[int]) -> list[tuple[int, Record]]:
        """The records that start at the given places, each with the number of its part."""
        firsts = self._first_places(path)
        wanted: dict[int, set[int]] = defaultdict(set)
        for start in starts:
            wanted[max(0, bisect_right(firsts, start) - 1)].add(start)
        found: list[tuple[int, Record]] = []
        left: set[int] = set()
        for number in range(len(firsts) - 1, -1, -1):
            # A paragraph belongs to the part with the blank line before it, and may start behind that part's end.
            left |= wanted[number]
            if not left:
                continue
            for item in read_part(self._form, self._parts[path][number]):
                if isinstance(item, Record) and item.start in left:
                    found.append((number, item))
                    left.remove(item.start)
                    if not left:
                        break
        if left:
            raise changed(path)
        return found

    def _first_places(self, path: str) -> list[int]:
        """Where the parts of a file begin, in the unit of `Record.start`."""
        if path not in self._firsts:
            parts = self._parts[path]
            rows = row_starts(parts[0].path) if self._form.kind == "parquet" else None
            self._firsts[path] = [part.start if rows is None else rows[part.start] for part in parts]
        return self._firsts[path]

    def _located(self, source: Source, number: int, record: Record, raw: bytes) -> Located:
        """A document of a record, which belongs to a part of its file; `raw` is the record's text."""
        try:
            text = raw[source.offset : source.offset + source.num_bytes].decode()
        except UnicodeDecodeError as error:
            raise _other_text(source.path) from error
        if text_hash(text) != source.hash:
            raise _other_text(source.path)
        if self._form.document == "file":
            begin = self._text_bytes_before(source.path, record.start) + source.offset
            return Located(source.path, 0, begin, text, source.num_bytes)
        if self._form.kind in _BY_ROW:
            index = record.start
        else:
            index = record.number + sum(map(self._count, self._parts[source.path][:number]))
        return Located(source.path, index, source.offset, text, source.num_bytes)

    def _count(self, part: Part) -> int:
        """Records of a part, unreadable ones included."""
        if part not in self._counts:
            # A line of JSON need not be parsed to be counted.
            form = Format("text", document="line") if self._form.kind == "jsonl" else self._form
            self._counts[part] = sum(1 for _ in read_part(form, part))
        return self._counts[part]

    def _text_bytes_before(self, path: str, start: int) -> int:
        """Bytes of a file's decoded text before a line that starts at byte `start` of the file."""
        if not start:
            return 0
        if (path, start) not in self._lengths:
            num_bytes, position = 0, 0
            with open_bytes(self._parts[path][0].path) as file:
                while position < start and (line := file.readline()):
                    num_bytes += len(line) - line.endswith(b"\r\n") - (not position and line.startswith(_BOM)) * 3
                    position += len(line)
            self._lengths[path, start] = num_bytes
        return self._lengths[path, start]


def _other_text(path: str) -> DataError:
    return DataError(
        "a document is not the text that its cached tokens were made of",
        where=path,
        remedy="restore the file; or touch it, so that it is tokenized again",
    )
