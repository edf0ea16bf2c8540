"""Labelled rows from files: read whole, checked whole, with the place of every row for errors to name."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lmssl.data.archive import ARCHIVE_ERRORS, COMPRESSED, open_bytes
from lmssl.data.records import unreadable
from lmssl.errors import DataError
from lmssl.finetune.task import Classification, Instructions, Regression, Tokens
from lmssl.recipe.hints import nearest

KINDS = (".jsonl", ".csv", ".tsv")
_MAX_FIELD_CHARS = 1 << 27

Asked = Classification | Regression | Tokens | Instructions


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    given: Any
    """A text, a pair of texts, a tuple of words, or the messages before the answer."""
    answer: Any
    """A label, a number, a tuple of tags, or the text of the answer."""
    where: str
    """File and line, for errors."""

    @property
    def key(self) -> str:
        """What is given, as one text."""
        return orjson.dumps(self.given).decode()


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of every row of a file or of a folder that `datasets` wrote.

    Raises:
        DataError: there is no such file, its kind is unknown, or a row cannot be read.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if path.is_dir():
        yield from _saved(path)
        return
    if not path.exists():
        near = nearest(path.name, [found.name for found in path.parent.iterdir()]) if path.parent.is_dir() else None
        remedy = f"did you mean {path.with_name(near)}?" if near else "check the path; it is relative to this folder"
        raise DataError("there is no such file", where=str(path), remedy=remedy)
    if not suffixes or suffixes[-1] not in KINDS:
        raise DataError(
            f"{path.name!r} is no kind of table that is read",
            where=str(path),
            remedy=f"give a {', '.join(KINDS)} file, or a folder written by datasets' save_to_disk",
        )
    try:
        with open_bytes(str(path)) as file:
            if suffixes[-1] == ".jsonl":
                yield from _json_lines(path, file)
            else:
                yield from _table(path, file, tabs=suffixes[-1] == ".tsv")
    except OSError as error:
        raise unreadable(str(path), error) from error
    except ARCHIVE_ERRORS as error:
        raise DataError(
            f"the file is cut short or damaged: {error}", where=str(path), remedy="fetch or write it again"
        ) from error


def _json_lines(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError as error:
            raise DataError(f"this line is not JSON: {error}", where=where, remedy="mend or remove it") from error
        if not isinstance(row, dict):
            raise DataError(
                "this line is no JSON object", where=where, remedy='write {"text": ..., "label": ...} on each line'
            )
        yield where, row


def _table(path: Path, file: Any, *, tabs: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    # GLUE's .tsv files hold single quotation marks that quote nothing.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    csv.field_size_limit(_MAX_FIELD_CHARS)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, **style)
        try:
            yield from _cells(path, reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"the table cannot be read: {error}",
                where=f"{path}, line {reader.line_num + 1}",
                remedy="mend that row; quotation marks are doubled inside quoted text, and files are UTF-8",
            ) from error


def _cells(path: Path, reader: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    names: list[str] | None = None
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if not cells:
            continue
        if names is None:
            names = _header(cells, where)
            continue
        if len(cells) != len(names):
            raise DataError(
                f"this row has {len(cells)} cells and the header {len(names)}",
                where=where,
                remedy="put text with commas or line breaks in quotation marks, or write .jsonl",
            )
        yield where, dict(zip(names, cells, strict=True))


def _header(cells: Sequence[str], where: str) -> list[str]:
    twice = next((name for index, name in enumerate(cells) if name in cells[:index]), None)
    if twice is not None:
        raise DataError(f"two columns are called {twice!r}", where=where, remedy="give every column its own name")
    return list(cells)


def _saved(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "this folder was not written by datasets' save_to_disk",
            where=str(path),
            remedy="give a file, or a folder with dataset_info.json and state.json in it",
        ) from error
    if isinstance(data, datasets.DatasetDict):
        splits = [str(path / name) for name in data]
        raise DataError("this folder holds several splits", where=str(path), remedy=f"name one: {', '.join(splits)}")
    for number, row in enumerate(data):
        yield f"{path}, row {number}", {name: _named(data.features[name], value) for name, value in row.items()}


def _named(feature: Any, value: Any) -> Any:
    """Labels that a dataset keeps as numbers, by their names."""
    inner = getattr(feature, "feature", None)
    if inner is not None and hasattr(inner, "int2str") and isinstance(value, list):
        return [_named(inner, part) for part in value]
    return feature.int2str(value) if hasattr(feature, "int2str") and isinstance(value, int) and value >= 0 else value


def read_examples(path: Path, asked: Asked) -> list[Example]:
    """Every row of a file as the task reads it.

    Raises:
        DataError: the file cannot be read or has no rows, or a row lacks a field or holds something else in it.
    """
    found = [example(row, asked, where) for where, row in read_rows(path)]
    if not found:
        raise DataError("there are no rows", where=str(path), remedy="give a file with at least one")
    return found


def example(row: Mapping[str, Any], asked: Asked, where: str) -> Example:
    """One row as the task reads it.

    Raises:
        DataError: a field is missing, or holds something else.
    """
    if isinstance(asked, Tokens):
        return _tagged(row, asked, where)
    if isinstance(asked, Instructions):
        return _answered(row, asked, where)
    given: Any = _text(row, "text", asked.text, where)
    if asked.pair is not None:
        given = (given, _text(row, "pair", asked.pair, where))
    value = _field(row, "label", asked.label, where)
    answer = _label(value, asked.label, where) if isinstance(asked, Classification) else _score(value, asked, where)
    return Example(given, answer, where)


def _tagged(row: Mapping[str, Any], asked: Tokens, where: str) -> Example:
    parts = {}
    for key, name in (("words", asked.words), ("tags", asked.tags)):
        value = _field(row, key, name, where)
        if isinstance(value, str):
            value = value.split()
        if not isinstance(value, list):
            raise _wrong(name, value, "a list, or text with white space between the words", where)
        parts[key] = tuple(_label(item, name, where) if key == "tags" else item for item in value)
    words, tags = parts["words"], parts["tags"]
    empty = next((word for word in words if not isinstance(word, str) or not word.strip()), None)
    if empty is not None:
        raise _wrong(asked.words, empty, "a list of words, none of them empty", where)
    if len(words) != len(tags) or not words:
        raise DataError(
            f"{len(words)} words have {len(tags)} tags", where=where, remedy="give every word one tag, and some words"
        )
    return Example(words, tags, where)


def _answered(row: Mapping[str, Any], asked: Instructions, where: str) -> Example:
    if asked.messages is None:
        prompt = _text(row, "prompt", asked.prompt, where)
        return Example(prompt, _text(row, "completion", asked.completion, where), where)
    value = _field(row, "messages", asked.messages, where)
    shaped = isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
        for part in value
    )
    if not shaped or len(value) < 2 or value[-1]["role"] != "assistant":
        expected = "a list of at least two {role, content}, the last by the assistant"
        raise _wrong(asked.messages, value, expected, where)
    return Example(tuple({"role": m["role"], "content": m["content"]} for m in value[:-1]), value[-1]["content"], where)


def _field(row: Mapping[str, Any], key: str, name: str, where: str) -> Any:
    if name not in row:
        near = nearest(name, list(row))
        names = ", ".join(row) or "none"
        remedy = f"set task.{key} to the name of the field" + (f"; did you mean {near}?" if near else "")
        raise DataError(f"there is no field {name!r}; the fields are {names}", where=where, remedy=remedy)
    if row[name] is None or row[name] == "":
        raise DataError(f"the field {name!r} is empty", where=where, remedy="fill it, or remove the row")
    return row[name]


def _text(row: Mapping[str, Any], key: str, name: str, where: str) -> str:
    value = _field(row, key, name, where)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(name, value, "text", where)
    return value


def _label(value: Any, name: str, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or value == "":
        raise _wrong(name, value, "a label: text or a whole number; for fractions use task.kind regression", where)
    return str(value)


def _score(value: Any, asked: Regression, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(asked.label, value, "a number", where)
    return number


def _wrong(name: str, value: Any, expected: str, where: str) -> DataError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return DataError(f"the field {name!r} is {shown}; it must be {expected}", where=where, remedy="mend the row")
