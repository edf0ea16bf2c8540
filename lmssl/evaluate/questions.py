"""What every kind of evaluation gives, and how its files are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lmssl.data.archive import ARCHIVE_ERRORS, broken_archive, open_bytes
from lmssl.data.records import unreadable
from lmssl.data.units import expand_paths
from lmssl.errors import EvaluationError
from lmssl.evaluate.score import Row, Scores
from lmssl.recipe.data import Paths
from lmssl.recipe.suite import Evaluation

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Result:
    """What came out."""

    metrics: Metrics
    parts: dict[str, Metrics] = field(default_factory=dict)
    """The same by part: paradigms, tasks."""
    samples: tuple[dict[str, str], ...] = ()
    """Texts that the model wrote, each with its prompt."""


@dataclass(frozen=True)
class Question:
    """An evaluation as rows, and what its scores mean."""

    section: Evaluation
    rows: list[Row]
    finish: Callable[[Scores], Result]
    causal: bool


def question_files(path: str | Paths, name: str) -> list[str]:
    """Files behind the paths of an evaluation.

    Raises:
        DataError: a path gives no file.
        EvaluationError: a file is empty; names it.
    """
    files = expand_paths(path, "jsonl")
    for file in files:
        if next(numbered_lines(file), None) is None:
            raise EvaluationError(
                "the file is empty", where=f"{file}, of evaluation {name!r}", remedy="write it again, or leave it out"
            )
    return files


def numbered_lines(path: str) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not blank; a place names file and line.

    Raises:
        DataError: the file cannot be read.
        EvaluationError: a line is not UTF-8.
    """
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}, line {number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise EvaluationError(
                        f"the line is not UTF-8: {error.reason} at byte {error.start}",
                        where=place,
                        remedy="save the file as UTF-8",
                    ) from error
                if line.strip():
                    yield place, line
    except ARCHIVE_ERRORS as error:
        raise broken_archive(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a JSONL file.

    Raises:
        DataError: the file cannot be read.
        EvaluationError: a line is no JSON object.
    """
    for place, line in numbered_lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"the line is not JSON: {error}", where=place, remedy="repair the line") from error
        if not isinstance(values, dict):
            raise EvaluationError(
                f"the line holds a JSON {type(values).__name__} instead of an object",
                where=place,
                remedy="write one object a line",
            )
        yield place, values


def text_of(values: dict[str, Any], name: str, place: str) -> str:
    """The text in a field.

    Raises:
        EvaluationError: there is no such field, or it holds no text.
    """
    value = field_of(values, name, place)
    if not isinstance(value, str) or not value.strip():
        held = "an empty text" if isinstance(value, str) else json.dumps(value)[:60]
        raise EvaluationError(
            f"the field {name!r} holds {held} instead of a text", where=place, remedy="repair the line, or leave it out"
        )
    return value


def field_of(values: dict[str, Any], name: str, place: str) -> Any:
    """The value of a field.

    Raises:
        EvaluationError: there is no such field; names those there are.
    """
    if name not in values:
        names = ", ".join(values) or "none"
        raise EvaluationError(
            f"the field {name!r} is missing; the fields are {names}",
            where=place,
            remedy="repair the line, or name the fields in the suite",
        )
    return values[name]
