"""One chunk on disk: written beside its place, mapped when read, verified by a checksum.

A chunk's folder holds `tokens.ds` and `tokens.ds.index` in datatrove's layout, `documents.npy` with what tracing
needs, `bad.jsonl` where records were unreadable, and `meta.json`, written last. Special tokens are not in it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lmssl.data.corpus import ChunkText, Document, Unit
from lmssl.data.records import BadRecord
from lmssl.data.token_files import mapped
from lmssl.tokenizer.encode import Encoder

DOCUMENT_FIELDS = np.dtype(
    [
        ("text_hash", "<u8"),
        ("num_bytes", "<i8"),
        ("part", "<i8"),
        ("record", "<i8"),
        ("start", "<i8"),
        ("offset", "<i8"),
    ]
)
"""One row per document: hash and size of its text, and where the text comes from (see `corpus.Document`)."""

CHUNK_FORMAT = 2
"""Goes into the names of chunks: a cache of another format is not read."""

_BATCH_BYTES = 4 << 20
_WHITE_SPACE = b" \t\n\r\v\f"
_ARRAYS = ("tokens.ds", "tokens.ds.index", "documents.npy")


@dataclass(frozen=True)
class ChunkMeta:
    """What `meta.json` says."""

    format: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_bad: int
    num_empty: int
    is_last: bool
    """No chunk of the unit follows."""
    dtype: str
    checksum: str
    """Of tokens, document ends and document rows; the same for the same content under another path."""
    fingerprint: str
    """The tokenizer's."""
    sources: tuple[str, ...]
    """Paths, indexed by the column `part`."""


@dataclass(frozen=True)
class Chunk:
    """A cached chunk; arrays are mapped, not read."""

    path: Path
    meta: ChunkMeta

    def tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids of all documents, shape [tokens]."""
        return mapped(self.path / "tokens.ds", np.dtype(self.meta.dtype), self.meta.num_tokens)

    def ends(self) -> npt.NDArray[np.uint64]:
        """Where each document ends in `tokens`, shape [documents]."""
        return mapped(self.path / "tokens.ds.index", np.dtype("<u8"), self.meta.num_documents)

    def documents(self) -> npt.NDArray[Any]:
        """Rows of `DOCUMENT_FIELDS`, shape [documents]."""
        rows: npt.NDArray[Any] = np.load(self.path / "documents.npy")
        return rows


def read_chunk(path: Path) -> Chunk | None:
    """A chunk folder as it stands, or None where the sizes of its files do not fit `meta.json`."""
    try:
        values = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        meta = ChunkMeta(**{**values, "sources": tuple(values["sources"])})
        sizes = [(path / name).stat().st_size for name in _ARRAYS[:2]]
        (path / "documents.npy").stat()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    expected = [meta.num_tokens * np.dtype(meta.dtype).itemsize, meta.num_documents * 8]
    return Chunk(path, meta) if sizes == expected else None


def bad_records(chunk: Chunk) -> list[tuple[str, BadRecord]]:
    """Unreadable records of a chunk, each with its file."""
    if not chunk.meta.num_bad:
        return []
    lines = map(json.loads, (chunk.path / "bad.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["file"], BadRecord(line["record"], line["start"], line["reason"])) for line in lines]


def write_chunk(
    folder: Path,
    unit: Unit,
    text: ChunkText,
    dtype: np.dtype[Any],
    fingerprint: str,
    ends: npt.NDArray[np.int64],
    rows: npt.NDArray[Any],
    digest: xxhash.xxh3_128,
) -> None:
    """Write everything behind `tokens.ds`, which is there; `meta.json` comes last.

    Args:
        fingerprint: the tokenizer's.
        ends: where each document ends in the tokens, shape [documents].
        rows: of `DOCUMENT_FIELDS`, shape [documents].
        digest: of the bytes of `tokens.ds`; becomes that of the chunk, see `chunk_checksum`.
    """
    documents = io.BytesIO()
    np.save(documents, rows)
    for name, content in zip(_ARRAYS[1:], (ends.astype("<u8").tobytes(), documents.getvalue()), strict=True):
        (folder / name).write_bytes(content)
        digest.update(content)
    if text.bad:
        (folder / "bad.jsonl").write_text(_bad_lines(unit, text), encoding="utf-8")
    meta = ChunkMeta(
        format=CHUNK_FORMAT,
        num_documents=len(rows),
        num_tokens=int(ends[-1]) if len(ends) else 0,
        num_bytes=int(rows["num_bytes"].sum()),
        num_bad=len(text.bad),
        num_empty=text.num_empty,
        is_last=text.is_last,
        dtype=dtype.str,
        checksum=digest.hexdigest(),
        fingerprint=fingerprint,
        sources=tuple(part.path for part in unit.parts),
    )
    (folder / "meta.json").write_text(json.dumps(vars(meta), indent=1), encoding="utf-8")


def write_tokens(
    path: Path, documents: Sequence[Document], encoder: Encoder, check: Callable[[], None]
) -> tuple[npt.NDArray[np.int64], xxhash.xxh3_128]:
    """Write the tokens of some documents; returned is where each ends, shape [documents], and the file's digest.

    `check` is called between batches and may raise. Of a document longer than a batch one part at a time is in work.
    The encoder's type of ids is the file's.
    """
    counts = np.zeros(len(documents), np.int64)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for numbers, parts in _batches(documents, encoder):
            check()
            ids, ends = encoder.encode_utf8(parts)
            file.write(ids.data)
            digest.update(ids.data)
            np.add.at(counts, numbers, np.diff(ends, prepend=0))
    return np.cumsum(counts), digest


def document_rows(documents: Sequence[Document]) -> npt.NDArray[Any]:
    """Rows of `DOCUMENT_FIELDS` for some documents."""
    rows = [(utf8_hash(d.raw), len(d.raw), d.part, d.record, d.start, d.offset) for d in documents]
    return np.array(rows, dtype=DOCUMENT_FIELDS)


def text_hash(text: str) -> int:
    """64 bits of the text, without the ASCII white space around it."""
    return utf8_hash(text.encode())


def utf8_hash(raw: bytes) -> int:
    """`text_hash` of a text in UTF-8."""
    start, stop = 0, len(raw)
    while stop and raw[stop - 1] in _WHITE_SPACE:
        stop -= 1
    while start < stop and raw[start] in _WHITE_SPACE:
        start += 1
    return xxhash.xxh3_64_intdigest(memoryview(raw)[start:stop])


def chunk_checksum(folder: Path) -> str:
    """128 bits of a chunk's tokens, ends and rows, by xxHash: against damage, not against malice."""
    digest = xxhash.xxh3_128()
    try:
        for name in _ARRAYS:
            update_from_file(digest, folder / name)
    except FileNotFoundError:
        return "missing"
    return digest.hexdigest()


def update_from_file(digest: xxhash.xxh3_128, path: Path) -> None:
    """Take the bytes of a file into a digest."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _bad_lines(unit: Unit, text: ChunkText) -> str:
    lines = (
        {"file": unit.parts[part].path, "record": bad.number, "start": bad.start, "reason": bad.reason}
        for part, bad in text.bad
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _batches(documents: Sequence[Document], encoder: Encoder) -> Iterator[tuple[list[int], list[bytes]]]:
    """Documents, or parts of long ones, each with the document's number."""
    numbers, batch, room = list[int](), list[bytes](), _BATCH_BYTES
    for number, document in enumerate(documents):
        for part in encoder.parts(document.raw, _BATCH_BYTES):
            numbers.append(number)
            batch.append(part)
            room -= len(part)
            if room <= 0:
                yield numbers, batch
                numbers, batch, room = [], [], _BATCH_BYTES
    if batch:
        yield numbers, batch
