"""Documents that are tokens already: datatrove's `.ds` files and Megatron's `.bin` with `.idx`.

`X.ds` holds u16 or u32 tokens, `X.ds.index` the u64 end of each document, `X.ds.metadata` the name of the tokenizer,
the bytes of a token and their number. `X.bin` holds tokens of the type that `X.idx` names. Files are mapped, so that
opening one costs the same whatever its size.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lmssl.data.records import Format, Part, TokenFormat, changed, file_version, unreadable
from lmssl.errors import DataError

TEXT_BYTES_PER_TOKEN = 4
"""About what English text has; only the size of chunks and weights that a recipe leaves out depend on it."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_REMEDY = "write or copy the tokens again, and all of their files together"
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenFile:
    """An opened token file."""

    path: str
    tokens: npt.NDArray[Any]
    """Shape [tokens]."""
    num_documents: int
    ends: Callable[[int, int], IntArray]
    """`ends(first, stop)`: where these documents end in `tokens`, shape [stop - first]."""

    def end(self, document: int) -> int:
        """Where a document ends in `tokens`."""
        return int(self.ends(document, document + 1)[0])


@dataclass(frozen=True, eq=False)
class TokenDocuments:
    """The documents of a part that are not empty, without a final eos token."""

    ids: npt.NDArray[Any]
    """Shape [tokens]."""
    ends: IntArray
    """Shape [documents]."""
    numbers: IntArray
    """Shape [documents]: which document of the file each is."""
    num_empty: int


@dataclass(frozen=True, eq=False)
class CopiedTokens:
    """The documents of several parts, one behind the other; shape [documents] each."""

    ends: IntArray
    hashes: npt.NDArray[np.uint64]
    """64 bits of the tokens; the same whatever the type of token in the file."""
    parts: IntArray
    numbers: IntArray
    """Which document of its file each is."""
    num_empty: int


def list_ranges(path: str, count_for: Callable[[int], int]) -> list[tuple[Part, int]]:
    """The documents of a file in ranges of about equally many tokens, each with its estimated bytes of text.

    Args:
        count_for: how many ranges, given the estimated bytes of text of the whole file.

    Raises:
        DataError: the file is truncated, or its index is missing or does not fit.
    """
    file, version = open_tokens(path), _version(path)
    if not file.num_documents:
        return []
    num_tokens = len(file.tokens)
    count = max(1, min(count_for(num_tokens * TEXT_BYTES_PER_TOKEN), file.num_documents))
    documents = range(file.num_documents)
    cuts = [bisect_left(documents, num_tokens * i // count, key=file.end) + 1 for i in range(1, count)]
    cuts = sorted({0, *cuts, file.num_documents})
    tokens = [file.end(cut - 1) if cut else 0 for cut in cuts]
    return [
        (Part(path, version, a, b), (last - first) * TEXT_BYTES_PER_TOKEN)
        for (a, b), (first, last) in zip(pairwise(cuts), pairwise(tokens), strict=True)
    ]


def count_tokens(path: str) -> int:
    """Tokens of a file.

    Raises:
        DataError: the file is truncated, or its index is missing or does not fit.
    """
    return len(open_tokens(path).tokens)


def tokenizer_name(path: str) -> str | None:
    """The tokenizer that the metadata beside a `.ds` file names; None where there is none."""
    found = _metadata(path)
    return found[0] if found is not None and not found[0].startswith("Unknown Tokenizer") else None


def copy_documents(
    found: Iterable[TokenDocuments], file: BinaryIO, dtype: np.dtype[Any], check: Callable[[], None]
) -> CopiedTokens:
    """Write the tokens of several parts one after the other into a file; `check` is called before each part."""
    check()
    none = np.empty(0, np.int64)
    columns: list[tuple[Any, ...]] = [(none, np.empty(0, np.uint64), none, none)]
    num_tokens = num_empty = 0
    for number, documents in enumerate(found):
        file.write(documents.ids.astype(dtype).tobytes())
        hashes = np.array(_hashes(documents), np.uint64)
        columns.append((num_tokens + documents.ends, hashes, np.full(len(hashes), number), documents.numbers))
        num_tokens, num_empty = num_tokens + len(documents.ids), num_empty + documents.num_empty
        check()
    ends, hashes, parts, numbers = (np.concatenate(column) for column in zip(*columns, strict=True))
    return CopiedTokens(ends, hashes, parts, numbers, num_empty)


def _hashes(documents: TokenDocuments) -> list[int]:
    wide = np.ascontiguousarray(documents.ids, "<u4").data
    bounds = [0, *documents.ends.tolist()]
    return [int.from_bytes(hashlib.blake2b(wide[a:b], digest_size=8).digest(), "little") for a, b in pairwise(bounds)]


def read_documents(form: Format, part: Part, num_ids: int, eos_id: int | None) -> TokenDocuments:
    """The documents of a part.

    Args:
        num_ids: ids must be below it.
        eos_id: the tokenizer's end-of-document token, which the files may hold after each document.

    Raises:
        DataError: the file changed, its index does not fit, an id is not the tokenizer's, or a document lacks the
            eos token that the recipe promises.
    """
    if _version(part.path) != part.version:
        raise changed(part.path)
    file = open_tokens(part.path)
    stop = file.num_documents if part.stop is None else part.stop
    begin = file.end(part.start - 1) if part.start else 0
    ends = file.ends(part.start, stop)
    begins = np.concatenate([[begin], ends[:-1]])
    if (ends < begins).any() or begin < 0 or (len(ends) and ends[-1] > len(file.tokens)):
        raise _broken(part.path, "the index does not ascend within the tokens")
    ids = file.tokens[begin : int(ends[-1])]
    begins, ends = begins - begin, ends - begin
    wrong = (ids < 0) | (ids >= num_ids)
    if wrong.any():
        at = int(wrong.argmax())
        document = part.start + int(np.searchsorted(ends, at, side="right"))
        raise DataError(
            f"id {int(ids[at])} is not one of the tokenizer's {num_ids}",
            where=f"{part.path}, document {document}",
            remedy="set `tokenizer` to the one that these files were written with",
        )
    ends_with_eos = form.ends_with_eos if isinstance(form, TokenFormat) else False
    return _without_eos(ends_with_eos, part, ids, begins, ends, eos_id)


def _without_eos(
    ends_with_eos: bool | str, part: Part, ids: npt.NDArray[Any], begins: IntArray, ends: IntArray, eos_id: int | None
) -> TokenDocuments:
    if ends_with_eos is True and eos_id is None:
        raise DataError(
            "ends_with_eos is true, and the tokenizer has no eos token",
            where=part.path,
            remedy="set the corpus's ends_with_eos: false, or use a tokenizer whose config names an eos_token",
        )
    lengths = ends - begins
    if ends_with_eos is not False and eos_id is not None:
        closed = lengths > 0
        closed[closed] = ids[ends[closed] - 1] == eos_id
        if ends_with_eos is True and not closed.all():
            raise DataError(
                f"the document does not end with the eos token, id {eos_id}",
                where=f"{part.path}, document {part.start + int(closed.argmin())}",
                remedy="set the corpus's ends_with_eos: auto, which takes off the token where there is one",
            )
        lengths = lengths - closed
        keep = np.ones(len(ids), bool)
        keep[ends[closed] - 1] = False
        ids = ids[keep]
    full = lengths > 0
    numbers = part.start + np.flatnonzero(full)
    return TokenDocuments(ids, np.cumsum(lengths[full]), numbers, int((~full).sum()))


def open_tokens(path: str) -> TokenFile:
    """Map a token file.

    Raises:
        DataError: the file is unreadable or truncated, or its index is missing or does not fit.
    """
    try:
        return _open_megatron(path) if path.endswith(".bin") else _open_datatrove(path)
    except FileNotFoundError as error:
        missing = str(error.filename)
        if missing == path:
            raise unreadable(path, error) from error
        raise DataError(
            "the token file has no index", where=path, remedy=f"put {os.path.basename(missing)} beside it"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _open_datatrove(path: str) -> TokenFile:
    num_bytes, index_bytes = os.path.getsize(path), os.path.getsize(f"{path}.index")
    if index_bytes % 8:
        raise _broken(f"{path}.index", "it does not consist of whole u64 numbers")
    ends = mapped(f"{path}.index", np.dtype("<u8"), index_bytes // 8)
    num_tokens = int(ends[-1]) if len(ends) else 0
    named = _metadata(path)
    sizes = (named[1],) if named is not None else (2, 4)
    size = next((size for size in sizes if num_bytes == num_tokens * size), None)
    if size is None:
        widths = " or ".join(f"{num_tokens * size:,}" for size in sizes)
        raise _broken(path, f"it has {num_bytes:,} bytes, and its index of {num_tokens:,} tokens means {widths}")

    def between(first: int, stop: int) -> IntArray:
        return ends[first:stop].astype(np.int64)

    return TokenFile(path, mapped(path, np.dtype(f"<u{size}"), num_tokens), len(ends), between)


def _open_megatron(path: str) -> TokenFile:
    index, num_bytes = index_path(path), os.path.getsize(path)
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _broken(index, "it does not begin like an index of Megatron's mapped files (MMIDIDX)")
    _, format_version, code, num_pieces, num_bounds = _HEADER.unpack(header)
    if format_version != 1 or code not in _MEGATRON_TYPES:
        raise _broken(index, f"version {format_version} with token type {code} is not one that is read")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    wanted = _HEADER.size + 12 * num_pieces + 8 * num_bounds
    if os.path.getsize(index) < wanted:  # newer files may hold a mode for each sequence behind
        raise _broken(index, f"it has {os.path.getsize(index):,} bytes, and its header means at least {wanted:,}")
    lengths = mapped(index, np.dtype("<i4"), num_pieces, _HEADER.size)
    starts = mapped(index, np.dtype("<i8"), num_pieces, _HEADER.size + 4 * num_pieces)
    bounds = mapped(index, np.dtype("<i8"), num_bounds, _HEADER.size + 12 * num_pieces)
    end = int(starts[-1]) + int(lengths[-1]) * dtype.itemsize if num_pieces else 0
    if end != num_bytes:
        raise _broken(path, f"it has {num_bytes:,} bytes, and its index ends at {end:,}")
    if (num_bounds and int(bounds[0]) != 0) or (int(bounds[-1]) if num_bounds else 0) != num_pieces:
        raise _broken(index, "its documents do not cover its sequences")

    def between(first: int, stop: int) -> IntArray:
        if not num_pieces:
            return np.zeros(stop - first, np.int64)
        last = bounds[first + 1 : stop + 1] - 1  # of the sequences of each document
        if ((last < -1) | (last >= num_pieces)).any():
            raise _broken(index, "its documents are not sequences of it")
        _check_pieces(index, lengths, starts, int(bounds[first]), int(last[-1]) + 1, dtype.itemsize)
        ends = starts[last] // dtype.itemsize + lengths[last]
        return np.where(last < 0, 0, ends).astype(np.int64)

    tokens = mapped(path, dtype, num_bytes // dtype.itemsize)
    return TokenFile(path, tokens, max(0, num_bounds - 1), between)


def _check_pieces(
    index: str, lengths: npt.NDArray[Any], starts: npt.NDArray[Any], first: int, stop: int, itemsize: int
) -> None:
    """Sequences must follow each other without a gap, or documents would hold what is not theirs."""
    begins = starts[first : stop + 1]
    held = lengths[first:stop].astype(np.int64) * itemsize
    if first == 0 and len(begins) and int(begins[0]) != 0:
        raise _broken(index, "its first sequence does not start the file")
    if (held < 0).any() or (np.diff(begins) != held[: max(0, len(begins) - 1)]).any():
        raise _broken(index, "its sequences do not follow each other")


def _metadata(path: str) -> tuple[str, int] | None:
    """Tokenizer and bytes per token, as datatrove writes them beside a `.ds` file."""
    file = f"{path}.metadata"
    if path.endswith(".bin") or not os.path.exists(file):
        return None
    with open(file, encoding="utf-8", errors="replace") as stream:
        name, _, size = stream.readline().strip().rpartition("|")
    if size not in ("2", "4"):
        raise _broken(file, f"its first line must end with |2 or |4, the bytes of a token, and not with {size!r}")
    return name, int(size)


def _version(path: str) -> str:
    beside = index_path(path)
    return f"{file_version(path)}+{file_version(beside)}"


def index_path(path: str) -> str:
    """The index that lies beside a token file."""
    return f"{path.removesuffix('.bin')}.idx" if path.endswith(".bin") else f"{path}.index"


def mapped(path: str | Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> npt.NDArray[Any]:
    """Numbers of a file from a byte on, mapped, shape [count]."""
    if not count:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))  # plain arrays slice faster


def without_text(corpus: str) -> DataError:
    """The error for comparing documents that are tokens already with evaluation text."""
    return DataError(
        "documents that are tokens already cannot be compared with evaluation text",
        where=f"data.filters.decontaminate, corpus {corpus!r}",
        remedy="compare their text before it is tokenized, and set data.filters.decontaminate: null",
    )


def _broken(path: str, reason: str) -> DataError:
    return DataError(f"the token file is truncated or does not fit its index: {reason}", where=path, remedy=_REMEDY)
