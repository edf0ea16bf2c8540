"""One reader per file kind: a part of a source in, records out; a record that cannot be read is a `BadRecord`.

Text and JSON lines are read from byte ranges. A record belongs to the range in which it starts, so ranges that
tile a file yield every record once, wherever the cuts fall.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import orjson
import pyarrow as pa

from lmssl.data import hf_datasets, parquet_files, python_docs
from lmssl.data.archive import ARCHIVE_ERRORS, broken_archive, open_bytes
from lmssl.data.records import BadRecord, Format, Item, Part, Record, changed, checked, file_version, unreadable
from lmssl.errors import DataError

_BOM = b"\xef\xbb\xbf"
_PIECE_BYTES = 1 << 20
_LONG_BYTES = 8192
_LINE_END = re.compile(rb"\r\n")
_BLANK_LINE = re.compile(rb"(?m)^[ \t\r\v\f]*\n")


def read_part(form: Format, part: Part) -> Iterator[Item]:
    """Records of a part, in order.

    Raises:
        DataError: the source is missing, unreadable, truncated, corrupt or changed since it was listed.
    """
    if form.kind == "datasets":
        yield from hf_datasets.read_rows(form, part)
        return
    if form.kind == "tokens":
        raise DataError(
            "the corpus holds tokens, and text is needed here",
            where=part.path,
            remedy="name the corpus that the tokens were made from",
        )
    if file_version(part.path) != part.version:
        raise changed(part.path)
    try:
        yield from _read_file(form, part)
    except ARCHIVE_ERRORS as error:
        raise broken_archive(part.path, error) from error
    except OSError as error:
        raise unreadable(part.path, error) from error


def _read_file(form: Format, part: Part) -> Iterator[Item]:
    if form.kind == "parquet":
        yield from parquet_files.read_rows(form, part)
    elif form.kind == "python_docs":
        yield from python_docs.read_docs(part.path)
    else:
        with open_bytes(part.path) as file:
            if form.kind == "jsonl":
                yield from _read_jsonl(_lines(file, part), form.field)
            else:
                yield from _read_text(file, part, form)


def _lines(file: BinaryIO, part: Part, *, go_on: bool = False) -> Iterator[tuple[int, bytes]]:
    """(byte start, line) of the lines that start in the part; the byte order mark is dropped.

    `go_on`: if one does, also of all that follow the part.
    """
    position = _first_line(file, part)
    if position is None:
        return
    for line in file:
        if part.stop is not None and position >= part.stop and not go_on:
            return
        yield position, line.removeprefix(_BOM) if position == 0 else line
        position += len(line)


def _first_line(file: BinaryIO, part: Part) -> int | None:
    """Go to the first line that starts in the part; never farther, because a line may be as long as the file."""
    if not part.start:
        return 0
    position = part.start - 1
    file.seek(position)
    while part.stop is None or position < part.stop:
        left = _PIECE_BYTES if part.stop is None else min(_PIECE_BYTES, part.stop - position)
        piece = file.readline(left)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            return position
    return None


def _read_text(file: BinaryIO, part: Part, form: Format) -> Iterator[Item]:
    if form.document == "line":
        pieces: Iterable[tuple[int, bytes]] = ((start, line.rstrip(b"\r\n")) for start, line in _lines(file, part))
    elif form.document == "paragraph":
        pieces = (_without_blank_lines(start, piece) for start, piece in _paragraphs(file, part))
    else:
        yield from _read_whole(file, part, form.section_bytes)
        return
    number = 0
    for start, piece in pieces:
        if piece and not piece.isspace():
            yield _decoded(piece, number, start)
            number += 1


def _read_whole(file: BinaryIO, part: Part, section_bytes: int | None) -> Iterator[Item]:
    """A file, or of a long one that will be cut into sections anyway the paragraphs of a range, as one text.

    Text that will be cut into sections loses what is not UTF-8 and no more, and is several texts then.
    """
    if part.start == 0 and part.stop is None:
        start, raw = 0, file.read()
    else:
        start, raw = _run_of_paragraphs(file, part)
    if _is_empty(text := _without_mark(raw, start)):
        return
    item = _decoded(text, 0, start)
    if isinstance(item, Record) or section_bytes is None:
        yield item
    else:
        yield from _read_damaged(raw, start, section_bytes)


def _read_damaged(raw: bytes, start: int, section_bytes: int) -> Iterator[Item]:
    """What lies between the parts of a text that are not UTF-8, and these; `start` is the byte where it starts."""
    number, done = 0, 0
    for begin, end in chain(_bad_spans(raw, section_bytes), [(len(raw), len(raw))]):
        if not _is_empty(text := _without_mark(raw[done:begin], start + done)):
            yield Record(plain_ends(text), number, start + done)
            number += 1
        if begin < end:
            yield _decoded(raw[begin:end], number, start + begin)
            number += 1
        done = end


def _bad_spans(raw: bytes, section_bytes: int) -> Iterator[tuple[int, int]]:
    """Paragraphs that are not UTF-8, and of one that would itself be cut into sections the lines that are not.

    They follow from the text around them alone, wherever a file is cut into ranges.
    """
    for begin, end in _paragraph_spans(raw):
        if is_utf8(raw[begin:end]):
            continue
        if end - begin <= section_bytes * 3 // 2:
            yield begin, end
            continue
        while begin < end:
            stop = raw.find(b"\n", begin, end) + 1 or end
            if not is_utf8(raw[begin:stop]):
                yield begin, stop
            begin = stop


def _paragraph_spans(raw: bytes) -> Iterator[tuple[int, int]]:
    begin = 0
    for blank in _BLANK_LINE.finditer(raw):
        if begin < blank.start():
            yield begin, blank.start()
        begin = blank.end()
    if begin < len(raw):
        yield begin, len(raw)


def _without_mark(raw: bytes, start: int) -> bytes:
    return raw if start else raw.removeprefix(_BOM)


def _is_empty(raw: bytes) -> bool:
    return not raw or raw.isspace()


def _paragraphs(file: BinaryIO, part: Part) -> Iterator[tuple[int, bytes]]:
    """(byte start, text) of paragraphs, each with the blank line before it, which decides the part it belongs to."""
    start, held, begun = 0, [], part.start == 0  # type: tuple[int, list[bytes], bool]
    for position, line in _lines(file, part, go_on=True):
        if part.stop is not None and position >= part.stop and not begun:
            return  # no paragraph of the part is open, and none begins here
        if not line.strip():
            if begun and held:
                yield start, b"".join(held)
                held = []
            if part.stop is not None and position >= part.stop:
                return
            begun = True
        if begun:
            start = start if held else position
            held.append(line)
    if held:
        yield start, b"".join(held)


def _run_of_paragraphs(file: BinaryIO, part: Part) -> tuple[int, bytes]:
    """What `_paragraphs` yields, joined: from the first blank line of the part to the first one behind it."""
    position = _first_line(file, part)
    if position is None:
        return part.start, b""
    block = file.read() if part.stop is None else file.read(part.stop - position)
    if block and not block.endswith(b"\n"):
        block += file.readline()
    start = 0
    if part.start:
        found = _BLANK_LINE.search(block)
        if found is None:
            return part.start, b""
        start = found.start()
    behind: list[bytes] = []
    for line in file:
        if not line.strip():
            break
        behind.append(line)
    return position + start, block[start:] + b"".join(behind)


def _without_blank_lines(start: int, piece: bytes) -> tuple[int, bytes]:
    first, _, rest = piece.partition(b"\n")
    if not first.strip():
        start, piece = start + len(first) + 1, rest
    return start, piece.rstrip(b"\r\n")


def _decoded(raw: bytes, number: int, start: int) -> Item:
    if not is_utf8(raw):
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            return BadRecord(number, start, f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {start + error.start}")
    return Record(plain_ends(raw), number, start)


def is_utf8(raw: bytes) -> bool:
    """Whether some bytes are UTF-8; Arrow knows it of a long text in an eighth of the time that decoding takes."""
    if len(raw) > _LONG_BYTES:
        offsets = struct.pack("=qq", 0, len(raw))  # `pa.array` would import pandas
        try:
            pa.LargeStringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(raw)).validate(full=True)
            return True
        except pa.ArrowInvalid:
            return False
    try:
        raw.decode()
        return True
    except UnicodeDecodeError:
        return False


def plain_ends(raw: bytes) -> bytes:
    """A text with its lines ended by line feeds alone, and without one by a carriage return alone changed."""
    if b"\r" not in raw:
        return raw
    if raw.count(b"\r", 0, _LONG_BYTES) < _LONG_BYTES >> 8:  # for few of them: `replace` looks at every line feed
        return _LINE_END.sub(b"\n", raw)
    return raw.replace(b"\r\n", b"\n")


def _read_jsonl(lines: Iterable[tuple[int, bytes]], field: str) -> Iterator[Item]:
    number = 0
    for start, line in lines:
        if line.strip():
            yield _json_record(line, field, number, start)
            number += 1


def _json_record(line: bytes, field: str, number: int, start: int) -> Item:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's own reader is the judge: it takes NaN, long numbers and deeper nesting, and tells what is wrong.
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadRecord(number, start, f"not UTF-8: byte 0x{line[error.start]:02x} at byte {start + error.start}")
        except (ValueError, RecursionError) as error:
            return BadRecord(number, start, f"not JSON: {error}")
    if not isinstance(values, dict):
        return BadRecord(number, start, f"a JSON {type(values).__name__} instead of an object")
    return checked(values.get(field), field, number, start, tuple(values))
