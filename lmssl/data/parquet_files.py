"""Parquet files, cut at row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import pyarrow
from pyarrow import parquet

from lmssl.data.archive import open_stored
from lmssl.data.records import Format, Item, Part, arrow_records, file_version, unreadable, wrong_field
from lmssl.data.remote import RemotePath
from lmssl.errors import DataError


def list_row_groups(path: str, field: str) -> list[tuple[Part, int]]:
    """Each row group of a file, with the bytes of its text column.

    Raises:
        DataError: the file is corrupt, or the field is missing or holds no text.
    """
    version, found = file_version(path), []
    with _open(path, footer=True) as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise wrong_field(field, schema.names, path)
        kind = schema.field(field).type
        if not _is_text(kind):
            raise wrong_field(field, schema.names, path, f"it holds {kind}, not text")
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            columns = (group.column(j) for j in range(group.num_columns))
            num_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
            found.append((Part(path, version, i, i + 1), num_bytes if group.num_rows else 0))
    return found


def row_starts(path: str) -> list[int]:
    """The first row of each row group of a file.

    Raises:
        DataError: the file is corrupt.
    """
    with _open(path, footer=True) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return list(accumulate(counts, initial=0))[:-1]


def read_rows(form: Format, part: Part) -> Iterator[Item]:
    """Records of some row groups; `start` is a row of the file.

    Raises:
        DataError: the file is corrupt.
    """
    with _open(part.path) as file:
        groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        batches = file.iter_batches(batch_size=1024, row_groups=list(groups), columns=[form.field])
        yield from arrow_records((batch.column(0) for batch in batches), form.field, row)


@contextmanager
def _open(path: str, *, footer: bool = False) -> Iterator[Any]:
    """`footer`: no more than that is read, and of a remote file no more is fetched."""
    try:
        with ExitStack() as opened:
            source: Any = path
            if isinstance(path, RemotePath):
                source = opened.enter_context(path.files.open_ranges(path) if footer else open_stored(path))
            yield opened.enter_context(parquet.ParquetFile(source))
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the parquet file is truncated or corrupt: {reason}", where=path, remedy="download or write it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _is_text(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    )
