"""What tells a corpus's files from others of the same names: each one's size, and a hash of three samples of it.

Times of change are left out: they differ between nodes that have a copy of the corpus each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from lmssl.data.records import unreadable
from lmssl.data.remote import RemotePath
from lmssl.data.token_files import index_path
from lmssl.data.units import Unit
from lmssl.errors import DataError

Mark = tuple[str, int, str]
"""Base name and size of a file, and the hash; of a remote file the version that the server gives it."""

_SAMPLE_BYTES = 64 << 10
_THREADS = 4
"""A network disk answers many at once; more would wait for the interpreter where the disk is a local one."""
_BATCH_FILES = 64
"""Files that a thread takes at once: handing over a single one costs as much as reading it."""
_MAX_NAMED = 5


def mark_files(units: Sequence[Sequence[Unit]]) -> dict[str, list[Mark]]:
    """The marks of the files of each corpus, in the order in which they are read.

    Raises:
        DataError: one cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return {listed[0].corpus: _marks(threads, _files(listed)) for listed in units}


def _marks(threads: ThreadPoolExecutor, paths: Sequence[str]) -> list[Mark]:
    batches = [paths[start : start + _BATCH_FILES] for start in range(0, len(paths), _BATCH_FILES)]
    return [mark for marks in threads.map(lambda batch: [_mark(path) for path in batch], batches) for mark in marks]


def refuse_other_files(then: Mapping[str, Sequence[Mark]], units: Sequence[Sequence[Unit]]) -> None:
    """Refuse files that are not those of a ledger, by name; one from before there were marks knows none.

    Raises:
        DataError: some are gone, new, unreadable, or have other content.
    """
    known = [listed for listed in units if listed[0].corpus in then]
    for listed, (corpus, now) in zip(known, mark_files(known).items(), strict=True):
        old, new = Counter(mark[0] for mark in then[corpus]), Counter(mark[0] for mark in now)
        moved = {"gone": sorted((old - new).elements()), "new": sorted((new - old).elements())}
        if old != new:
            raise DataError(
                f"the files of corpus {corpus!r} are not those that the run began with",
                where="; ".join(f"{how}: {_named(names)}" for how, names in moved.items() if names),
                remedy="restore them, or start a new run in another folder",
            )
        pairs = zip(_files(listed), then[corpus], now, strict=True)
        changed = [path for path, mark, other in pairs if tuple(mark) != tuple(other)]
        if changed:
            raise DataError(
                f"the text of corpus {corpus!r} changed since the run began",
                where=_named(changed),
                remedy="restore these files, or start a new run in another folder",
            )


def _files(units: Sequence[Unit]) -> list[str]:
    """What a corpus is read from; of datasets on the Hub nothing, since their versions follow the library's."""
    paths = list(dict.fromkeys(part.path for unit in units for part in unit.parts))
    if units[0].form.kind == "datasets":
        return sorted(file for folder in paths for file in _arrow_files(folder))
    if units[0].form.kind == "tokens":
        return [file for path in paths for file in (path, index_path(path))]
    return paths


def _arrow_files(folder: str) -> list[str]:
    return [
        os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names if name.endswith(".arrow")
    ]


def _mark(path: str) -> Mark:
    name = os.path.basename(path)
    if isinstance(path, RemotePath):
        return name, path.num_bytes, path.version.partition(".")[2]
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            starts = sorted({0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)})
            if size <= len(starts) * _SAMPLE_BYTES:  # one call; samples overlap
                whole = memoryview(file.read(size))
                samples: list[bytes | memoryview] = [whole[start : start + _SAMPLE_BYTES] for start in starts]
            else:
                samples = [os.pread(file.fileno(), _SAMPLE_BYTES, start) for start in starts]
    except OSError as error:
        raise unreadable(path, error) from error
    for sample in samples:
        digest.update(sample)
    return name, size, digest.hexdigest()


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
