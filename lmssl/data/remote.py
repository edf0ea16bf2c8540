"""Corpora on S3 and the like: listed at the start, downloaded block by block, kept in a folder of bounded size.

A `RemotePath` is the URL of a file as a string that knows the folder. A block carries file, version and place in its
name and is renamed when it is whole, so a file may be larger than the folder, and who needs a part of it downloads that
part. Blocks that were not read for the longest time make room; an open one holds a lock, and locked ones stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import tenacity

from lmssl.data.cancel import attended, locked, never, pause
from lmssl.data.remote_errors import explained, is_passing, unmasked
from lmssl.data.remote_listing import file_system, listed, version_of
from lmssl.errors import DataError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp"}
"""Schemes, and the package that reads each."""

_BLOCK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_GIVE_UP_SECONDS = 300.0
_LONGEST_WAIT_SECONDS = 60.0
_SILENCE_SECONDS = 30.0
Result = TypeVar("Result")


class RemotePath(str):
    """A URL with its version when it was listed, and where its download is kept; equal to the plain string."""

    files: RemoteFiles
    version: str

    def __new__(cls, url: str, files: RemoteFiles, version: str) -> RemotePath:
        """A path below a scheme of `PACKAGES`."""
        path = super().__new__(cls, url)
        path.files, path.version = files, version
        return path

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.files, self.version

    def __deepcopy__(self, memo: dict[int, Any]) -> RemotePath:
        return self  # it cannot change, and `dataclasses.astuple` copies deeply

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return int(self.version.partition(".")[0])


@dataclass(frozen=True)
class RemoteFiles:
    """A folder of downloads."""

    folder: Path
    max_bytes: int
    """Downloads together; more than a block of each process that reads."""
    give_up_seconds: float = _GIVE_UP_SECONDS
    """How long one request is tried again."""
    first_wait_seconds: float = 1.0
    """Before the second attempt; doubles from there, up to a minute."""
    block_bytes: int = _BLOCK_BYTES
    """Asked for at a time, and kept or removed together."""
    silence_seconds: float = _SILENCE_SECONDS
    """After which a web server that sends nothing is asked again."""
    cancelled: Callable[[], bool] = field(default=never, compare=False, repr=False)
    """Once it is true, downloading in any thread stops early with `Cancelled`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cancelled": never}  # which is for the threads of one process

    def list_files(self, url: str, is_wanted: Callable[[str], bool]) -> list[RemotePath]:
        """The files behind a URL, a pattern, or a folder, sorted; of a folder those that are wanted.

        Raises:
            DataError: the scheme is not read, its package is missing, nothing is found, or access is denied.
        """
        found = self._retried(url, lambda system: listed(system, url, is_wanted))
        paths = []
        for name, listed_info in found.items():
            info = self._info(name) if listed_info.get("size") is None else listed_info
            if info.get("size") is None:
                raise DataError("the server does not say how large the file is", where=name, remedy="download it first")
            paths.append(RemotePath(name, self, version_of(info)))
        return sorted(paths)

    def read_start(self, path: RemotePath, num_bytes: int) -> bytes:
        """The first bytes of a file, without downloading the rest.

        Raises:
            DataError: see `list_files`.
        """
        if self._place(path, 0).exists():
            with self.open(path) as file:
                return file.read(num_bytes)
        return self._fetch(path, 0, min(num_bytes, path.num_bytes))

    def open_ranges(self, path: RemotePath) -> BinaryIO:
        """Open a file of which little is read, such as a footer: what is asked for is asked of the server.

        Raises:
            DataError: see `list_files`; also while it is read.
        """
        last = max(0, path.num_bytes - 1) // self.block_bytes
        return self.open(path) if self._place(path, last).exists() else cast(BinaryIO, _Ranges(path))

    def open(self, path: RemotePath) -> BinaryIO:
        """Open a file for reading; blocks of it that are not there are downloaded when they are read.

        Raises:
            DataError: while it is read: the file changed since it was listed, a block is larger than the folder may
                be, or see `list_files`.
        """
        return io.BufferedReader(_Blocks(path), _BUFFER_BYTES)

    def open_block(self, path: RemotePath, number: int) -> BinaryIO:
        """Open a block of a file, after downloading it if need be.

        Raises:
            DataError: see `open`.
        """
        place, start = self._place(path, number), number * self.block_bytes
        stop = min(start + self.block_bytes, path.num_bytes)
        while True:
            try:
                file = place.open("rb", buffering=0)
            except FileNotFoundError:
                self._download(path, start, stop, place)
                continue
            fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed; see `_make_room`
            status = os.fstat(file.fileno())
            if status.st_nlink and status.st_size == stop - start:
                os.utime(file.fileno())
                return cast(BinaryIO, file)
            file.close()  # removed between opening and locking, or cut short by something else
            self._download(path, start, stop, place)

    def _place(self, path: RemotePath, number: int) -> Path:
        what = f"{path}\n{path.version}\n{self.block_bytes}\n{number}"
        key = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        return self.folder / f"{key}-{os.path.basename(path)}"

    def _download(self, path: RemotePath, start: int, stop: int, place: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(place.with_name(f".lock-{place.name[:2]}"), self.cancelled):
                if _size(place) == stop - start:  # another process was faster
                    return
                self._check_version(path)
                raw = self._fetch(path, start, stop)
                self._check_version(path)  # or the block might belong to another version
                self._store(raw, place)
        except OSError as error:
            raise DataError(
                f"the download cannot be written: {error.strerror or error}",
                where=str(self.folder),
                remedy="free space or fix permissions there, or set data.cache to another folder",
            ) from error

    def _store(self, raw: bytes, place: Path) -> None:
        """Write a block; one process at a time, so that the folder does not change while it is measured."""
        with locked(self.folder / ".lock-room", self.cancelled):
            self._make_room(len(raw))
            partial = place.with_name(f".part-{place.name}")
            with partial.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(place)

    def _fetch(self, path: RemotePath, start: int, stop: int) -> bytes:
        def read(system: Any) -> bytes:
            raw: bytes = system.cat_file(path, start=start, end=stop)
            if len(raw) == path.num_bytes:
                raw = raw[start:stop]  # a server that does not know ranges sends everything
            if len(raw) != stop - start:
                raise ConnectionError(f"{len(raw):,} of {stop - start:,} bytes arrived")
            return raw

        return self._retried(path, read)

    def _check_version(self, path: RemotePath) -> None:
        if version_of(self._info(path)) != path.version:
            raise DataError(
                "the source changed after the corpus was listed",
                where=path,
                remedy="start again, and leave corpora alone while a run reads them",
            )

    def _info(self, url: str) -> dict[str, Any]:
        def look(system: Any) -> dict[str, Any]:
            system.invalidate_cache()
            info: dict[str, Any] = system.info(url)
            return info

        return self._retried(url, look)

    def _make_room(self, num_bytes: int) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # whoever else cleans up here takes no lock
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) + num_bytes - self.max_bytes
        for _, size, path in sorted(found):
            if excess > 0 and not path.name.startswith(".lock-") and _remove_unused(path):
                excess -= size
        if excess > 0:
            raise DataError(
                f"a download of {num_bytes:,} bytes does not fit: {excess:,} bytes too many beside those in use",
                where=str(self.folder),
                remedy=f"raise data.remote_cache_bytes, now {self.max_bytes:,}",
            )

    def _retried(self, url: str, ask: Callable[[Any], Result]) -> Result:
        """What the file system of a URL answers."""

        def attempt() -> Result:
            system = file_system(url, self.silence_seconds)  # in this thread, because each has its own for good
            return attended(lambda: ask(system), self.cancelled)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.give_up_seconds),
            wait=tenacity.wait_exponential(self.first_wait_seconds, max=_LONGEST_WAIT_SECONDS),
            retry=tenacity.retry_if_exception(is_passing),
            sleep=lambda seconds: pause(seconds, self.cancelled),
        )
        with explained(url, self.give_up_seconds):
            result: Result = retrying(unmasked, url, attempt)
            return result


class _Ranges(io.RawIOBase):
    """A remote file as a stream that asks the server for what is read, and keeps nothing."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._path.num_bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or begin to; 0 at the end."""
        stop = min(self._at + len(buffer), self._path.num_bytes)
        if stop <= self._at:
            return 0
        raw = self._some(self._at, stop)
        buffer[: len(raw)] = raw
        self._at += len(raw)
        return len(raw)

    def _some(self, start: int, stop: int) -> bytes:
        return self._path.files._fetch(self._path, start, stop)


class _Blocks(_Ranges):
    """A remote file whose blocks are downloaded as they are read; it holds the lock of one at a time."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path)
        self._number = -1
        self._block: BinaryIO | None = None

    def close(self) -> None:
        """Close the block."""
        if self._block is not None:
            self._block.close()
        super().close()

    def _some(self, start: int, stop: int) -> bytes:
        number, offset = divmod(start, self._path.files.block_bytes)
        if self._block is None or number != self._number:
            if self._block is not None:
                self._block.close()
                self._block = None
            self._block, self._number = self._path.files.open_block(self._path, number), number
        self._block.seek(offset)
        raw = self._block.read(stop - start)
        if not raw:
            raise OSError(f"a download was cut short while it was read: {self._block.name}")
        return raw


def is_remote(path: str) -> bool:
    """Whether a path of a recipe is a URL."""
    return "://" in path


def check_scheme(url: str, *, allow_https: bool) -> None:
    """Refuse what is not read.

    Raises:
        DataError: the scheme is unknown, its package is missing, or `https` is not allowed.
    """
    scheme = url.partition("://")[0]
    if scheme not in PACKAGES:
        raise DataError(
            f"files behind {scheme}:// are not read",
            where=url,
            remedy=f"use one of {', '.join(f'{name}://' for name in PACKAGES)}, or download the files first",
        )
    if scheme == "https" and not allow_https:
        raise DataError(
            "the recipe does not allow downloads over https",
            where=url,
            remedy="set the corpus's allow_https: true if you trust the server to keep its files as they are",
        )
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise DataError(
            f"reading {scheme}:// takes the package {PACKAGES[scheme]}, which is not installed",
            where=url,
            remedy=f"pip install {PACKAGES[scheme]}",
        )


def _size(path: Path) -> int | None:
    """Bytes of a file; None: it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _remove_unused(path: Path) -> bool:
    """Delete a file unless somebody reads it."""
    try:
        with path.open("r+b") as file:  # NFS gives this lock to writers alone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:  # its room is free as well
        return True
    except OSError:
        return False
    return True
