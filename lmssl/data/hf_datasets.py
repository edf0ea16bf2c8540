"""Rows of a `datasets` folder, read where they lie, or of a dataset on the Hub, streamed in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmssl.data.records import Format, Item, Part, arrow_records, changed, checked, wrong_field
from lmssl.errors import DataError

_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """What is known of a dataset before it is read."""

    path: str
    version: str
    num_bytes: int
    """0: unknown."""
    num_rows: int | None
    """None: it can only be read in order."""


def describe(form: Format, path: str) -> Source:
    """Find a dataset: a folder written by `save_to_disk`, or anything `load_dataset` knows.

    Raises:
        DataError: no such dataset or split, or a field that it does not have.
    """
    local = os.path.expanduser(path)
    if _is_saved(local):
        data = _load(form, local)
        num_bytes = sum(os.path.getsize(file["filename"]) for file in data.cache_files)
        return Source(os.path.abspath(local), str(data._fingerprint), num_bytes, data.num_rows)
    builder = _builder(form, path)
    return Source(path, f"{builder.hash}.{builder.config_id}", int(builder.info.dataset_size or 0), None)


def read_rows(form: Format, part: Part) -> Iterator[Item]:
    """Records of a part; `start` is a row number.

    Raises:
        DataError: the dataset cannot be read.
    """
    if _is_saved(part.path):
        data = _load(form, part.path)
        if data._fingerprint != part.version:
            raise changed(part.path)
        data = data.select(range(part.start, part.stop or 0)).with_format("arrow")
        columns = (rows[form.field].combine_chunks() for rows in data.iter(batch_size=_ROWS))
        yield from arrow_records(columns, form.field, part.start)
        return
    try:
        for number, row in enumerate(_stream(form, part.path)):
            yield checked(row.get(form.field), form.field, number, number, tuple(row))
    except (OSError, ValueError, RuntimeError) as error:
        raise _unavailable(part.path, error) from error


def _is_saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _load(form: Format, path: str) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(path, error) from error
    if isinstance(data, datasets.DatasetDict):
        if form.split not in data:
            raise DataError(
                f"there is no split {form.split!r}; the splits are {', '.join(sorted(data))}",
                where=path,
                remedy="set the corpus's `split`",
            )
        data = data[form.split]
    if form.field not in data.column_names:
        raise wrong_field(form.field, data.column_names, path)
    if data.features[form.field].dtype not in ("string", "large_string"):
        raise wrong_field(form.field, data.column_names, path, f"it holds {data.features[form.field].dtype}, not text")
    return data.select_columns([form.field])


def _builder(form: Format, path: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(path, form.config, revision=form.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unavailable(path, error) from error


def _stream(form: Format, path: str) -> Any:
    import datasets

    return datasets.load_dataset(path, form.config, split=form.split, revision=form.revision, streaming=True)


def _unavailable(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"datasets cannot read it: {reason}",
        where=path,
        remedy="give a folder written by save_to_disk or the name of a dataset on the Hub, its `config` and `split`; "
        "for files of text use kind: text, jsonl or parquet",
    )
