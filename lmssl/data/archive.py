"""Compressed files as streams that know when they are cut short."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

import zstandard

from lmssl.data.remote import RemotePath
from lmssl.errors import DataError

COMPRESSED = (".gz", ".zst")
ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading a truncated or corrupt file raises."""

_BUFFER_BYTES = 1 << 20
_MAX_WINDOW_BYTES = 1 << 31  # --long=31, the most that zstd's command line tool writes


def open_bytes(path: str) -> BinaryIO:
    """Open a file for reading, decompressed; the end of every zstd frame is verified."""
    file = open_stored(path)
    if path.endswith(".gz"):
        return io.BufferedReader(_GzipFile(file), _BUFFER_BYTES)
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(file), _BUFFER_BYTES)
    return file


def open_stored(path: str) -> BinaryIO:
    """Open a file for reading as it is stored; a remote one is downloaded first."""
    return path.files.open(path) if isinstance(path, RemotePath) else open(path, "rb", buffering=_BUFFER_BYTES)


class _GzipFile(gzip.GzipFile):
    """A gzip file that closes what it reads and refuses to be empty."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._file = file
        if not file.read(1):
            self.close()
            raise EOFError("the file is empty")
        file.seek(0)

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()


class _ZstdFile(io.RawIOBase):
    """A zstd file as a stream; unlike zstandard's own reader it refuses a file that ends inside a frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._ready = b""
        self._started = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with text; 0 at the end of the last frame."""
        while not self._ready:
            compressed = self._file.read(_BUFFER_BYTES)
            if not compressed:
                if self._frame is not None or not self._started:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._ready = self._decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        self._started = True
        texts = []
        while compressed:
            if self._frame is None:
                self._frame = _new_frame()
            texts.append(self._frame.decompress(compressed))
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(texts)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def expansion(path: str) -> float:
    """Bytes of text per compressed byte, measured on the first mebibyte of the file.

    Raises:
        DataError: it is not in the format that its name says.
    """
    if isinstance(path, RemotePath):
        compressed = path.files.read_start(path, _BUFFER_BYTES)
    else:
        with open(path, "rb") as file:
            compressed = file.read(_BUFFER_BYTES)
    rest, num_bytes = compressed, 0
    try:
        while rest:
            stream = zlib.decompressobj(wbits=31) if path.endswith(".gz") else _new_frame()
            num_bytes += len(stream.decompress(rest))
            rest = stream.unused_data if stream.eof else b""
    except ARCHIVE_ERRORS as error:
        raise broken_archive(path, error) from error
    return num_bytes / max(1, len(compressed))


def broken_archive(path: str, error: Exception) -> DataError:
    """The error for a compressed file that does not decompress to its end."""
    return DataError(
        f"the archive is truncated or corrupt: {error}", where=path, remedy="download or compress the file again"
    )


def _new_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
