"""What every reader shares: parts of sources, records, and what is wrong with one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lmssl.data.remote import RemotePath
from lmssl.errors import DataError


@dataclass(frozen=True)
class Format:
    """How the bytes of a corpus become documents."""

    kind: Literal["text", "jsonl", "parquet", "datasets", "python_docs", "tokens"]
    field: str = ""
    """Name of the text field, where there are fields."""
    document: Literal["file", "line", "paragraph"] | None = None
    section_bytes: int | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class TokenFormat(Format):
    """How files of ready-made tokens become documents."""

    ends_with_eos: bool | Literal["auto"] = "auto"
    """Whether each document ends with an eos token, which is taken off; `auto`: where it does."""


@dataclass(frozen=True)
class Part:
    """A range of one source: bytes of a text file, row groups of a parquet file, rows of a dataset, documents."""

    path: str
    version: str
    """Changes when the source does: size and modification time of a file."""
    start: int = 0
    stop: int | None = None
    """None: to the end."""


@dataclass(frozen=True, slots=True)
class Record:
    """One text of a source."""

    raw: bytes
    """The text in UTF-8; whoever makes a record has checked that it is."""
    number: int
    """Counted from the start of the part."""
    start: int
    """Where it starts in the whole source: the byte (after decompression), the row, or the line of a Python file."""

    @property
    def text(self) -> str:
        """The text, decoded."""
        return self.raw.decode()


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read, and why."""

    number: int
    start: int
    reason: str
    fields: tuple[str, ...] | None = None
    """Names of its fields, where the reason is a wrong field."""


Item = Record | BadRecord


def file_version(path: str) -> str:
    """Size and modification time of a file; of a remote one what it had when it was listed.

    Raises:
        DataError: it cannot be examined.
    """
    if isinstance(path, RemotePath):
        return path.version
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return f"{status.st_size}.{status.st_mtime_ns}"


def checked(value: object, field: str, number: int, start: int, fields: tuple[str, ...]) -> Item:
    """A record from the value of a text field, or what is wrong with it."""
    if field not in fields:
        return BadRecord(number, start, f"no field {field!r}", fields)
    if not isinstance(value, str):
        wrong = fields if value is not None else None  # one null is a bad record, not a wrong field
        return BadRecord(number, start, f"field {field!r} holds {type(value).__name__} instead of text", wrong)
    try:
        return Record(value.encode(), number, start)
    except UnicodeEncodeError as error:
        return BadRecord(number, start, f"field {field!r} holds a lone surrogate, U+{ord(value[error.start]):04X}")


def arrow_records(columns: Iterable[Any], field: str, row: int) -> Iterator[Item]:
    """Records from Arrow arrays of strings, the first of which begins at a row."""
    number = 0
    for column in columns:
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = [_arrow_value(value) for value in column]
        for value in values:
            if isinstance(value, UnicodeDecodeError):
                yield BadRecord(number, row + number, f"not UTF-8: {value}")
            else:
                yield checked(value, field, number, row + number, (field,))
            number += 1


def _arrow_value(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def wrong_field(field: str, fields: Iterable[str], where: str, found: str = "no such field") -> DataError:
    """The error for a text field that a corpus does not have or that holds no text."""
    names = sorted(fields)
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.5) or difflib.get_close_matches(
        field.lower(), [name.lower() for name in names], n=1, cutoff=0.5
    )
    guess = next((name for name in names if near and name.lower() == near[0].lower() and name != field), None)
    remedy = "set the corpus's `field` to the name of its text"
    return DataError(
        f"field {field!r}: {found}; the fields are {', '.join(names) or 'none'}",
        where=where,
        remedy=f"{remedy}; did you mean {guess!r}?" if guess else remedy,
    )


def changed(path: str) -> DataError:
    """The error for a source that is no longer what it was when the corpus was listed."""
    return DataError(
        "the source changed after the corpus was listed",
        where=path,
        remedy="start again, and leave corpora alone while a run reads them",
    )


def unreadable(path: str, error: OSError) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(
        f"the file cannot be read: {error.strerror or error}", where=path, remedy="check the path and its permissions"
    )
