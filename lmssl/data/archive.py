"""Compressed files as streams that know when they are cut short."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import zstandard

from lmssl.data.remote import RemotePath
from lmssl.errors import DataError

COMPRESSED = (".gz", ".zst")
ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading a truncated or corrupt file raises."""

_BUFFER_BYTES = 1 << 20
_ZSTD_MAGIC, _ZSTD_SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_REPEATED_BYTE = 1
_MAX_BLOCK_BYTES = 128 << 10
_STRANGE_BYTES = 1024
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
        self._texts = _zstd_texts(file)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with text, or begin to; 0 at the end of the last frame."""
        while not self._ready:
            text = next(self._texts, None)
            if text is None:
                return 0
            self._ready = memoryview(text)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]  # of a view: nothing is copied
        return count

    def readall(self) -> bytes:
        """All that is left."""
        return b"".join((self._ready, *self._texts))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _zstd_texts(file: BinaryIO) -> Iterator[bytes]:
    """The text of all frames, at most one block's at a time.

    Raises:
        EOFError: the file is empty or ends inside a frame.
        zstandard.ZstdError: it is not in the format.
    """
    frame: Any = None
    is_empty = True
    for rest in _zstd_pieces(file):
        is_empty = False
        while rest:
            frame = frame or _new_frame()
            yield frame.decompress(rest)
            rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None or is_empty:
        raise EOFError("it ends inside a zstd frame")


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """A file in pieces that hold one block at most, which is never more than 128 KiB of text.

    A mebibyte of blocks may hold 32 GiB of text, and zstandard gives all the text of what it is given. Where the file
    is not in the format (RFC 8878, section 3.1) the cuts mean nothing, and zstandard says what is wrong.
    """
    while magic := file.read(4):
        if magic[1:] == _ZSTD_SKIPPABLE and magic[0] & 0xF0 == 0x50:
            yield magic + (size := file.read(4))
            yield from _pieces(file, int.from_bytes(size, "little"))
            continue
        if magic != _ZSTD_MAGIC:
            yield magic
            yield from iter(partial(file.read, _STRANGE_BYTES), b"")
            return
        descriptor = file.read(1)
        flags = int.from_bytes(descriptor, "little")
        is_single = flags >> 5 & 1
        size_bytes = (is_single, 2, 4, 8)[flags >> 6]
        yield magic + descriptor + file.read((1 - is_single) + (0, 1, 2, 4)[flags & 3] + size_bytes)
        is_last = False
        while not is_last and (head := file.read(3)):
            fields = int.from_bytes(head, "little")
            is_last, kind, num_bytes = bool(fields & 1), fields >> 1 & 3, fields >> 3
            # Of a repeated byte the size is that of the text. No block is longer than 128 KiB; one that is, is damaged.
            yield head + file.read(1 if kind == _REPEATED_BYTE else min(num_bytes, _MAX_BLOCK_BYTES))
        if flags & 4:
            yield file.read(4)  # the checksum


def _gzip_texts(file: BinaryIO) -> Iterator[bytes]:
    """The text of all members as far as they go, a mebibyte at a time."""
    rest = file.read()
    while rest:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            text = member.decompress(rest, _BUFFER_BYTES)
            yield text
            rest = member.unconsumed_tail
            if not rest and len(text) < _BUFFER_BYTES:
                break
        rest = member.unused_data


def _pieces(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while piece := file.read(min(num_bytes, _BUFFER_BYTES)):
        yield piece
        num_bytes -= len(piece)


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
    texts = _gzip_texts if path.endswith(".gz") else _zstd_texts
    num_bytes = 0
    try:
        with suppress(EOFError):  # the first mebibyte ends anywhere
            for text in texts(io.BytesIO(compressed)):
                num_bytes += len(text)
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
