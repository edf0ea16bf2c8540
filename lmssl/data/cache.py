"""Token chunks on disk: built once, mapped ever after, verified when opened.

Folders are built beside their place and renamed into it, so whatever stands there under its name is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from lmssl.data.cancel import check, locked
from lmssl.data.chunk import (
    CHUNK_FORMAT,
    DOCUMENT_FIELDS,
    Chunk,
    chunk_checksum,
    document_rows,
    read_chunk,
    update_from_file,
    write_chunk,
    write_tokens,
)
from lmssl.data.columns import store_array
from lmssl.data.corpus import ChunkText, Unit, read_chunks
from lmssl.data.records import TokenFormat
from lmssl.data.token_files import copy_documents, read_documents
from lmssl.errors import DataError
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from lmssl.data.overlaps import EvaluationText

LOCKS_ARE_MISSING = "there are no locks on the file system of"
"""How the line begins that `report` hears once, where `flock` is not supported."""

_TEMPORARY = ".tmp-"
_ABANDONED_SECONDS = 3600.0
"""Nothing is written for so long into the folder of a builder that was killed; others write all the time."""


@dataclass(frozen=True)
class Claim:
    """A chunk to build: its text was read, and others who want it wait."""

    is_new: bool
    """False: it is there, and only the comparison with evaluation text is missing."""
    is_last: bool
    """No chunk of the unit follows."""
    build: Callable[[], Chunk]
    """Builds it, in any thread; to be called once. Raises as `ChunkCache.get` does."""


class ChunkCache:
    """Chunks of one tokenizer below one folder; `report` hears of chunks that are built again, and of missing locks.

    `threads`: so many call it to build chunks, and each has a core; 0: one does, with all cores.
    """

    def __init__(
        self,
        root: Path,
        tokenizer: Tokenizer,
        *,
        max_bad_records: int,
        report: Callable[[str], None],
        cancelled: Callable[[], bool],
        evaluation: EvaluationText | None = None,
        threads: int = 0,
    ) -> None:
        self._root = root
        self._tokenizer = tokenizer
        self._max_bad_records = max_bad_records
        self._report = report
        self._cancelled = cancelled
        self._evaluation = evaluation
        self._threads = threads
        self.num_built = 0
        """Chunks that this object wrote."""
        self._encoder: Encoder | None = None
        self._opening = threading.Lock()
        self._verified: set[str] = set()
        self._said_that_locks_are_missing = False
        self._one_at_a_time = threading.Lock()  # open units serve one thread
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
        claimed = self.claim(unit, index)
        return claimed.build() if isinstance(claimed, Claim) else claimed

    def claim(self, unit: Unit, index: int, *, wait: bool = True) -> Chunk | Claim:
        """Read what the index-th chunk of a unit is made of; returned is the chunk if it has been built meanwhile.

        Raises:
            Busy: another process has it in work, and `wait` is false; otherwise that is waited for.
            As `get` does.
        """
        name, held = self._name(unit, index), ExitStack()
        try:
            with self._one_at_a_time:
                held.enter_context(self._lock(name, wait))
                found = self._open(name)
                if found is not None and self._is_marked(found, unit):
                    held.close()
                    return found
                text = self._text(unit, index)
        except BaseException as error:
            held.close()
            if isinstance(error, OSError):
                raise _unwritable(self._root, error) from error
            raise
        return Claim(found is None, text.is_last, partial(self._build, held, found, name, unit, text))

    def read_past(self, unit: Unit, index: int) -> bool:
        """Whether the index-th chunk, which another process has in work, is the last one of its unit.

        Raises:
            As `get` does.
        """
        if unit.chunk_bytes is None:
            return True
        with self._one_at_a_time:
            return self._text(unit, index).is_last

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
        what = [CHUNK_FORMAT, self._tokenizer.fingerprint, astuple(unit.form), unit.chunk_bytes, index]
        if isinstance(unit.form, TokenFormat):
            what.append(self._tokenizer.eos_id)  # which the fingerprint does not cover
        key = json.dumps([what, [(part.path, part.version, part.start, part.stop) for part in unit.parts]])
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _path(self, name: str) -> Path:
        return self._root / "chunks" / name[:2] / name

    def _open(self, name: str) -> Chunk | None:
        """The chunk, if it is there and whole; content is verified once per process."""
        path = self._path(name)
        if not path.is_dir():
            return None
        chunk = read_chunk(path)
        if chunk is not None and (name in self._verified or _is_whole(chunk)):
            self._verified.add(name)
            return chunk
        return None

    def _is_marked(self, chunk: Chunk, unit: Unit) -> bool:
        """Whether it is known which documents overlap the evaluation text; ready-made tokens never do."""
        evaluation = self._evaluation
        return evaluation is None or isinstance(unit.form, TokenFormat) or evaluation.is_marked(chunk)

    def _build(self, held: ExitStack, found: Chunk | None, name: str, unit: Unit, text: ChunkText) -> Chunk:
        """Build a chunk and compare it with the evaluation text; of one that was found, only the latter."""
        try:
            with held:
                chunk = self._write_folder(name, unit, text) if found is None else found
                if self._evaluation is not None and not isinstance(unit.form, TokenFormat):
                    self._evaluation.mark(chunk, unit.corpus, text.documents, self._check_cancelled)
                return chunk
        except OSError as error:
            raise _unwritable(self._root, error) from error

    def _write_folder(self, name: str, unit: Unit, text: ChunkText) -> Chunk:
        building = _temporary(self._path(name))
        try:
            building.mkdir(parents=True)
            _sweep(building)
            write = self._copy if isinstance(unit.form, TokenFormat) else self._write
            write(building, unit, text)
            chunk = read_chunk(building)
            assert chunk is not None
            there = self._put(name, building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if there is not None:
            shutil.rmtree(building, ignore_errors=True)
            return there
        self._verified.add(name)
        self.num_built += 1
        return replace(chunk, path=self._path(name))

    def _put(self, name: str, building: Path) -> Chunk | None:
        """Rename a chunk into its place; returned is what a builder put there who was faster, for lack of locks."""
        target = self._path(name)
        while True:
            try:
                building.rename(target)
                return None
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            found = self._open(name)
            if found is not None:
                return found
            self._remove_damaged(target)
            self._check_cancelled()

    def _remove_damaged(self, target: Path) -> None:
        """Remove a chunk under another name, because a whole one may come to stand in its place meanwhile."""
        aside = _temporary(target)
        try:
            target.rename(aside)
        except FileNotFoundError:
            return
        if _is_whole(read_chunk(aside)):  # it came while the damaged one was looked at
            with suppress(OSError):
                aside.rename(target)
                return
        else:
            self._report(f"cached chunk {target} is damaged; building it again")
        shutil.rmtree(aside, ignore_errors=True)

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
        encoder = self._opened_encoder()
        ends, digest = write_tokens(folder / "tokens.ds", text.documents, encoder, self._check_cancelled)
        rows = document_rows(text.documents)
        write_chunk(folder, unit, text, self._dtype, self._tokenizer.fingerprint, ends, rows, digest)

    def _copy(self, folder: Path, unit: Unit, text: ChunkText) -> None:
        """A chunk of ready-made tokens; how many bytes their text had is not known, and 0 stands for that."""
        tokenizer = self._tokenizer
        with (folder / "tokens.ds").open("wb") as file:
            made = (read_documents(unit.form, part, tokenizer.num_tokens, tokenizer.eos_id) for part in unit.parts)
            copied = copy_documents(made, file, self._dtype, self._check_cancelled)
        rows = np.zeros(len(copied.ends), DOCUMENT_FIELDS)
        rows["text_hash"], rows["part"], rows["record"] = copied.hashes, copied.parts, copied.numbers
        rows["start"] = rows["record"]
        text = replace(text, num_empty=copied.num_empty)
        digest = xxhash.xxh3_128()
        update_from_file(digest, folder / "tokens.ds")
        write_chunk(folder, unit, text, self._dtype, tokenizer.fingerprint, copied.ends, rows, digest)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self._tokenizer.num_tokens <= 1 << 16 else "<u4")

    def _opened_encoder(self) -> Encoder:
        with self._opening:
            if self._encoder is None:
                self._encoder = Encoder(self._tokenizer, report=self._report, threads=self._threads, dtype=self._dtype)
            return self._encoder

    def _check_cancelled(self) -> None:
        check(self._cancelled)

    def _prepare_root(self) -> None:
        try:
            (self._root / "locks").mkdir(parents=True, exist_ok=True)
            probe = self._root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _unwritable(self._root, error) from error

    def _lock(self, name: str, wait: bool) -> AbstractContextManager[None]:
        """One builder per chunk where the file system has locks."""
        path = self._root / "locks" / f"{name[:3]}.lock"
        return locked(path, self._cancelled, self._say_that_locks_are_missing, wait=wait)

    def _say_that_locks_are_missing(self, error: OSError) -> None:
        if not self._said_that_locks_are_missing:
            self._said_that_locks_are_missing = True
            self._report(f"{LOCKS_ARE_MISSING} {self._root} ({error.strerror}): others may build the same chunks")


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_TEMPORARY}{target.name}-{uuid.uuid4().hex}")


def _is_whole(chunk: Chunk | None) -> bool:
    return chunk is not None and chunk_checksum(chunk.path) == chunk.meta.checksum


def _sweep(building: Path) -> None:
    """Remove what killed builders left beside a new folder, the time of which is now by the file system's own clock.

    Where locks do nothing, a young folder may be in work on another machine.
    """
    now = building.stat().st_mtime
    for folder in building.parent.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # another builder sweeps too
            if now - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > _ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(
        f"the token cache cannot be written: {error.strerror or error}",
        where=str(error.filename or root),
        remedy="free space or fix permissions there, or set data.cache to another folder",
    )
