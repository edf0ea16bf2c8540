"""Token chunks on disk: built once, mapped ever after, verified when opened.

A chunk's folder holds `tokens.ds` and `tokens.ds.index` in datatrove's layout, `documents.npy` with what tracing
needs, `bad.jsonl` where records were unreadable, and `meta.json`, written last. Folders are built beside their
place and renamed into it, so whatever stands there under its name is whole. Special tokens are not cached.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmssl.data.columns import store_array
from lmssl.data.corpus import ChunkText, Document, Unit, read_chunks
from lmssl.data.records import BadRecord, TokenFormat
from lmssl.data.token_files import copy_documents, mapped, read_documents
from lmssl.errors import DataError
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from lmssl.data.overlaps import EvaluationText

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

_FORMAT = 1
_BATCH_BYTES = 16 << 20
_LOCK_SECONDS = 0.05
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


class Cancelled(Exception):
    """Building was interrupted from another thread; nothing was written."""


class ChunkCache:
    """Chunks of one tokenizer below one folder; `report` hears of chunks that are built again."""

    def __init__(
        self,
        root: Path,
        tokenizer: Tokenizer,
        *,
        max_bad_records: int,
        report: Callable[[str], None],
        cancelled: Callable[[], bool],
        evaluation: EvaluationText | None = None,
    ) -> None:
        self._root = root
        self._tokenizer = tokenizer
        self._max_bad_records = max_bad_records
        self._report = report
        self._cancelled = cancelled
        self._evaluation = evaluation
        self.num_built = 0
        """Chunks that this object wrote."""
        self._encoder: Encoder | None = None
        self._verified: set[str] = set()
        self._one_at_a_time = threading.Lock()  # encoder and open units serve one thread
        self._reading: dict[Unit, tuple[int, Iterator[ChunkText]]] = {}
        self._prepare_root()

    def get(self, unit: Unit, index: int) -> Chunk:
        """The index-th chunk of a unit, from disk or newly built.

        Raises:
            DataError: the unit cannot be read, or the cache cannot be written.
            Cancelled: `cancelled` became true.
        """
        name = self._name(unit, index)
        found = self._open(name)
        if found is not None and self._is_marked(found, unit):
            return found
        try:
            with self._one_at_a_time, self._lock(name):
                found = self._open(name)  # another process may have built it meanwhile
                if found is None:
                    return self._build(name, unit, index)
                return found if self._is_marked(found, unit) else self._mark(found, unit, self._text(unit, index))
        except OSError as error:
            raise _unwritable(self._root, error) from error

    def peek(self, unit: Unit, index: int) -> Chunk | None:
        """The index-th chunk of a unit if nothing is missing of it on disk; its content is not verified."""
        found = read_chunk(self._path(self._name(unit, index)))
        return found if found is not None and self._is_marked(found, unit) else None

    def duplicates_path(self, name: str) -> Path:
        """Where the duplicates of a window are kept."""
        return self._root / "duplicates" / name[:2] / f"{name}.npy"

    def store(self, path: Path, values: npt.NDArray[Any]) -> None:
        """Write a small array into the cache.

        Raises:
            DataError: the cache cannot be written.
        """
        try:
            store_array(path, values)
        except OSError as error:
            raise _unwritable(self._root, error) from error

    def _name(self, unit: Unit, index: int) -> str:
        what = [_FORMAT, self._tokenizer.fingerprint, astuple(unit.form), unit.chunk_bytes, index]
        if isinstance(unit.form, TokenFormat):
            what.append(self._tokenizer.eos_id)  # which the fingerprint does not cover
        key = json.dumps([what, [astuple(part) for part in unit.parts]])
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _path(self, name: str) -> Path:
        return self._root / "chunks" / name[:2] / name

    def _open(self, name: str) -> Chunk | None:
        """The chunk, if it is there and whole; content is verified once per process."""
        path = self._path(name)
        if not path.is_dir():
            return None
        chunk = read_chunk(path)
        if chunk is not None and (name in self._verified or _checksum(path) == chunk.meta.checksum):
            self._verified.add(name)
            return chunk
        return None

    def _is_marked(self, chunk: Chunk, unit: Unit) -> bool:
        """Whether it is known which documents overlap the evaluation text; ready-made tokens never do."""
        evaluation = self._evaluation
        return evaluation is None or isinstance(unit.form, TokenFormat) or evaluation.is_marked(chunk)

    def _mark(self, chunk: Chunk, unit: Unit, text: ChunkText) -> Chunk:
        if self._evaluation is not None and not isinstance(unit.form, TokenFormat):
            self._evaluation.mark(chunk, unit.corpus, text.documents, self._check_cancelled)
        return chunk

    def _build(self, name: str, unit: Unit, index: int) -> Chunk:
        text = self._text(unit, index)
        target = self._path(name)
        for stale in target.parent.glob(f".tmp-{name}-*"):
            shutil.rmtree(stale)
        building = target.parent / f".tmp-{name}-{uuid.uuid4().hex}"
        building.mkdir(parents=True)
        try:
            write = self._copy if isinstance(unit.form, TokenFormat) else self._write
            write(building, unit, text)
            if target.exists():
                self._report(f"cached chunk {target} is damaged; building it again")
                shutil.rmtree(target)
            building.rename(target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        self._verified.add(name)
        self.num_built += 1
        chunk = read_chunk(target)
        assert chunk is not None
        return self._mark(chunk, unit, text)

    def _text(self, unit: Unit, index: int) -> ChunkText:
        """Read on where the last chunk of the unit ended, or from its start; ready-made tokens have no text."""
        if isinstance(unit.form, TokenFormat):
            return ChunkText([], [], 0, is_last=True)
        at, chunks = self._reading.pop(unit, (0, None))
        if chunks is None or at > index:
            at, chunks = 0, read_chunks(unit, max_bad_records=self._max_bad_records)
        for text in chunks:
            self._check_cancelled()
            if at == index:
                if not text.is_last:
                    self._reading[unit] = (at + 1, chunks)
                return text
            at += 1
        raise DataError(
            "the source is shorter than it was",
            where=unit.parts[-1].path,
            remedy="leave corpora alone while a run reads them",
        )

    def _write(self, folder: Path, unit: Unit, text: ChunkText) -> None:
        dtype, counts = self._dtype, []
        with (folder / "tokens.ds").open("wb") as file:
            for batch in _batches(text.documents):
                self._check_cancelled()
                ids, ends = self._encode([document.text for document in batch])
                file.write(ids.astype(dtype).tobytes())
                counts.append(np.diff(ends, prepend=0))
        ends = np.cumsum(np.concatenate(counts)) if counts else np.empty(0, np.int64)
        self._finish(folder, unit, text, ends, _rows(text.documents))

    def _copy(self, folder: Path, unit: Unit, text: ChunkText) -> None:
        """A chunk of ready-made tokens; how many bytes their text had is not known, and 0 stands for that."""
        tokenizer = self._tokenizer
        with (folder / "tokens.ds").open("wb") as file:
            made = (read_documents(unit.form, part, tokenizer.num_tokens, tokenizer.eos_id) for part in unit.parts)
            copied = copy_documents(made, file, self._dtype, self._check_cancelled)
        rows = np.zeros(len(copied.ends), DOCUMENT_FIELDS)
        rows["text_hash"], rows["part"], rows["record"] = copied.hashes, copied.parts, copied.numbers
        rows["start"] = rows["record"]
        self._finish(folder, unit, replace(text, num_empty=copied.num_empty), copied.ends, rows)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self._tokenizer.num_tokens <= 1 << 16 else "<u4")

    def _finish(
        self, folder: Path, unit: Unit, text: ChunkText, ends: npt.NDArray[np.int64], rows: npt.NDArray[Any]
    ) -> None:
        """Everything behind the tokens; `meta.json` comes last."""
        (folder / "tokens.ds.index").write_bytes(ends.astype("<u8").tobytes())
        np.save(folder / "documents.npy", rows)
        if text.bad:
            (folder / "bad.jsonl").write_text(_bad_lines(unit, text), encoding="utf-8")
        meta = ChunkMeta(
            format=_FORMAT,
            num_documents=len(rows),
            num_tokens=int(ends[-1]) if len(ends) else 0,
            num_bytes=int(rows["num_bytes"].sum()),
            num_bad=len(text.bad),
            num_empty=text.num_empty,
            is_last=text.is_last,
            dtype=self._dtype.str,
            checksum=_checksum(folder),
            fingerprint=self._tokenizer.fingerprint,
            sources=tuple(part.path for part in unit.parts),
        )
        (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")

    def _encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        if self._encoder is None:
            self._encoder = Encoder(self._tokenizer, report=self._report)
        encoded = self._encoder.encode(texts)
        return encoded.ids, encoded.ends

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise Cancelled

    def _prepare_root(self) -> None:
        try:
            (self._root / "locks").mkdir(parents=True, exist_ok=True)
            probe = self._root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _unwritable(self._root, error) from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One builder per chunk on this machine; the kernel releases the lock of a dead process."""
        with (self._root / "locks" / f"{name[:2]}.lock").open("a") as file:
            while True:
                self._check_cancelled()
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_SECONDS)
            yield


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


def text_hash(text: str) -> int:
    """64 bits of the text, without the whitespace around it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def _rows(documents: list[Document]) -> npt.NDArray[Any]:
    rows = [(text_hash(d.text), d.num_bytes, d.part, d.record, d.start, d.offset) for d in documents]
    return np.array(rows, dtype=DOCUMENT_FIELDS)


def _bad_lines(unit: Unit, text: ChunkText) -> str:
    lines = (
        {"file": unit.parts[part].path, "record": bad.number, "start": bad.start, "reason": bad.reason}
        for part, bad in text.bad
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _batches(documents: list[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    room = _BATCH_BYTES
    for document in documents:
        batch.append(document)
        room -= document.num_bytes
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_BYTES
    if batch:
        yield batch


def _checksum(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in _ARRAYS:
        try:
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except FileNotFoundError:
            return "missing"
    return digest.hexdigest()


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(
        f"the token cache cannot be written: {error.strerror or error}",
        where=str(error.filename or root),
        remedy="free space or fix permissions there, or set data.cache to another folder",
    )
