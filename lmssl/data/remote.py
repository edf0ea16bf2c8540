"""Corpora on S3 and the like: listed at the start, downloaded when they are read, kept in a folder of bounded size.

A `RemotePath` is the URL of a file as a string that knows the folder. A download goes on where it stopped, is renamed
when it is whole, and carries the version of the source in its name. Files that were not read for the longest time make
room; an open file holds a lock, and locked files stay.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import tenacity

from lmssl.errors import DataError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp"}
"""Schemes, and the package that reads each."""

_BLOCK_BYTES = 8 << 20
_GIVE_UP_SECONDS = 300.0
_LONGEST_WAIT_SECONDS = 60.0
_REFUSED = (FileNotFoundError, PermissionError, ImportError, TypeError, ValueError, DataError)
_NO_ACCESS = ("NoCredentialsError", "CredentialRetrievalError")
_VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "updated", "mtime")
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
    """Downloads together; more than the largest file."""
    give_up_seconds: float = _GIVE_UP_SECONDS
    """How long one request is tried again."""
    first_wait_seconds: float = 1.0
    """Before the second attempt; doubles from there, up to a minute."""
    block_bytes: int = _BLOCK_BYTES
    """Asked for at a time."""

    def list_files(self, url: str, is_wanted: Callable[[str], bool]) -> list[RemotePath]:
        """The files behind a URL, a pattern, or a folder, sorted; of a folder those that are wanted.

        Raises:
            DataError: the scheme is not read, its package is missing, nothing is found, or access is denied.
        """
        system = _file_system(url)
        found = self._retried(url, lambda: _listed(system, url, is_wanted))
        paths = []
        for name, info in found.items():
            if info.get("size") is None:
                raise DataError("the server does not say how large the file is", where=name, remedy="download it first")
            paths.append(RemotePath(name, self, _version(info)))
        return sorted(paths)

    def read_start(self, path: RemotePath, num_bytes: int) -> bytes:
        """The first bytes of a file, without downloading the rest.

        Raises:
            DataError: see `list_files`.
        """
        if self._place(path).exists():
            with self.open(path) as file:
                return file.read(num_bytes)
        return self._block(path, 0, min(num_bytes, path.num_bytes))

    def open_ranges(self, path: RemotePath) -> BinaryIO:
        """Open a file of which little is read, such as a footer: what is asked for is asked of the server.

        Raises:
            DataError: see `list_files`; also while it is read.
        """
        return self.open(path) if self._place(path).exists() else cast(BinaryIO, _Ranges(path))

    def open(self, path: RemotePath) -> BinaryIO:
        """Open the download of a file for reading, after downloading it if need be.

        Raises:
            DataError: the file changed since it was listed, it is larger than the folder may be, or see `list_files`.
        """
        place = self._place(path)
        while True:
            try:
                file = place.open("rb", buffering=1 << 20)
            except FileNotFoundError:
                self._download(path, place)
                continue
            fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed; see `_make_room`
            if os.fstat(file.fileno()).st_nlink:
                os.utime(place)
                return file
            file.close()  # removed between opening and locking

    def _place(self, path: RemotePath) -> Path:
        key = hashlib.blake2b(f"{path}\n{path.version}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{key}-{os.path.basename(path)}"

    def _download(self, path: RemotePath, place: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(place.with_name(f".lock-{place.name[:2]}")):
                if place.exists():  # another process was faster
                    return
                partial = place.with_name(f".part-{place.name}")
                self._make_room(path.num_bytes, keep=partial)
                self._check_version(path)
                self._fetch(path, partial)
                self._check_version(path)  # or its parts might belong to two versions
                partial.rename(place)
        except OSError as error:
            raise DataError(
                f"the download cannot be written: {error.strerror or error}",
                where=str(self.folder),
                remedy="free space or fix permissions there, or set data.cache to another folder",
            ) from error

    def _fetch(self, path: RemotePath, partial: Path) -> None:
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # or another download might make room with it
            if file.tell() > path.num_bytes:
                file.truncate(0)
            while (done := file.tell()) < path.num_bytes:
                file.write(self._block(path, done, min(done + self.block_bytes, path.num_bytes)))
            file.flush()
            os.fsync(file.fileno())

    def _block(self, path: RemotePath, start: int, stop: int) -> bytes:
        def read() -> bytes:
            raw: bytes = _file_system(path).cat_file(path, start=start, end=stop)
            if len(raw) == path.num_bytes:
                raw = raw[start:stop]  # a server that does not know ranges sends everything
            if len(raw) != stop - start:
                raise ConnectionError(f"{len(raw):,} of {stop - start:,} bytes arrived")
            return raw

        return self._retried(path, read)

    def _check_version(self, path: RemotePath) -> None:
        system = _file_system(path)

        def look() -> dict[str, Any]:
            system.invalidate_cache()
            info: dict[str, Any] = system.info(path)
            return info

        if _version(self._retried(path, look)) != path.version:
            raise DataError(
                "the source changed after the corpus was listed",
                where=path,
                remedy="start again, and leave corpora alone while a run reads them",
            )

    def _make_room(self, num_bytes: int, keep: Path) -> None:
        files = [path for path in self.folder.iterdir() if not path.name.startswith(".lock-") and path != keep]
        sizes = {path: path.stat() for path in files}
        excess = sum(status.st_size for status in sizes.values()) + num_bytes - self.max_bytes
        for path in sorted(files, key=lambda path: sizes[path].st_mtime_ns):
            if excess > 0 and _remove_unused(path):
                excess -= sizes[path].st_size
        if excess > 0:
            raise DataError(
                f"a download of {num_bytes:,} bytes does not fit: {excess:,} bytes too many beside files in use",
                where=str(self.folder),
                remedy=f"raise data.remote_cache_bytes, now {self.max_bytes:,}, or cut the corpus into smaller files",
            )

    def _retried(self, url: str, attempt: Callable[[], Result]) -> Result:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.give_up_seconds),
            wait=tenacity.wait_exponential(self.first_wait_seconds, max=_LONGEST_WAIT_SECONDS),
            retry=tenacity.retry_if_exception(_is_passing),
        )
        with _explained(url, self.give_up_seconds):
            result: Result = retrying(_unmasked, url, attempt)
            return result

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Ranges(io.RawIOBase):
    """A remote file that is not downloaded."""

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
        """Fill the buffer; 0 at the end."""
        stop = min(self._at + len(buffer), self._path.num_bytes)
        if stop <= self._at:
            return 0
        raw = self._path.files._block(self._path, self._at, stop)
        buffer[: len(raw)] = raw
        self._at = stop
        return len(raw)


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


def _file_system(url: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(str(url), use_listings_cache=False)[0]


def _listed(system: Any, url: str, is_wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Infos of files by URL."""
    system.invalidate_cache()
    if any(sign in url for sign in "*?["):
        found = system.glob(url, detail=True)
    elif url.startswith("http") or system.isfile(url):  # a web server has no folders
        found = {url: system.info(url)}
    else:
        found = {name: info for name, info in system.find(url, detail=True).items() if is_wanted(name)}
    files = {name: info for name, info in found.items() if info.get("type") != "directory"}
    if not files:
        raise FileNotFoundError(url)
    return {system.unstrip_protocol(name): info for name, info in files.items()}


def _version(info: dict[str, Any]) -> str:
    """Size and what else tells two versions of a file apart, as `records.file_version` puts it."""
    mark = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return f"{info.get('size')}.{mark.strip(chr(34))}"


def _unmasked(url: str, attempt: Callable[[], Result]) -> Result:
    """Try; the file system for the web says of whatever fails while it looks at a file that the file is not there."""
    try:
        return attempt()
    except FileNotFoundError as error:
        cause = error.__cause__
        if url.startswith("http") and isinstance(cause, Exception) and _status(cause) not in (404, 410):
            raise cause from None
        raise


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help."""
    if not isinstance(error, Exception) or isinstance(error, _REFUSED) or _is_refusal(error):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in (408, 429)


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in _NO_ACCESS or _status(error) in (401, 403)


def _status(error: BaseException) -> int | None:
    """What a server answered, under the names that the file systems' libraries give it."""
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status"),
        (response, "status_code"),
        (error, "code"),
    ):  # `code` warns where `status` is
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return None


@contextmanager
def _explained(url: str, give_up_seconds: float) -> Iterator[None]:
    """Turn what file systems raise into errors that say what to do."""
    try:
        yield
    except tenacity.RetryError as error:
        last = error.last_attempt
        raise DataError(
            f"gave up after {last.attempt_number} attempts in {give_up_seconds:g} seconds: {_said(last.exception())}",
            where=url,
            remedy="check the network and the server; the same command goes on where the download stopped",
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file or bucket, or the pattern matches nothing",
            where=url,
            remedy="check the spelling and, for another server than the provider's, its endpoint",
        ) from error
    except DataError:
        raise
    except Exception as error:
        if _is_refusal(error):
            raise DataError(
                f"access is denied: {_said(error)}", where=url, remedy="check the credentials and their rights"
            ) from error
        raise DataError(
            f"the file cannot be read: {_said(error)}", where=url, remedy="check the address and the server"
        ) from error


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _remove_unused(path: Path) -> bool:
    """Delete a file unless somebody reads it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        return False
    return True
