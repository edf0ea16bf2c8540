from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import DataError
from lmssl.finetune.splits import Splits, majority, read_splits
from lmssl.finetune.task import TaskFile

Write = Callable[[str, list[dict[str, Any]]], Path]


def split(
    kind: str = "classification", report: Callable[[str], None] = print, **files: Path
) -> tuple[Splits, TaskFile]:
    data = {name: str(path) for name, path in files.items()}
    task = TaskFile.model_validate({"name": "t", "task": {"kind": kind}, "data": data})
    return read_splits(task, report), task


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def test_labels_are_in_order(write: Write) -> None:
    train = write("a.jsonl", rows(10, 9, "b", "a", -1))
    assert split(train=train, validation=train)[0].labels == ("-1", "9", "10", "a", "b")


def test_one_class_is_refused(write: Write) -> None:
    train = write("a.jsonl", rows(1, 1, 1))
    with pytest.raises(DataError, match=r"(?s)every row has the same label: '1'.*at least two"):
        split(train=train, validation=train)
    same = write("b.jsonl", [{"words": ["a"], "tags": ["X"]}] * 3)
    with pytest.raises(DataError, match="every row has the same tags: 'X'"):
        split("tokens", train=same, validation=same)
    with pytest.raises(DataError, match="every row has the same number: 1"):
        split("regression", train=train, validation=train)


def test_an_unknown_label_in_evaluation_is_refused(write: Write) -> None:
    train, other = write("a.jsonl", rows("x", "y")), write("b.jsonl", rows("x", "z"))
    with pytest.raises(DataError, match=r"(?s)'z' never occurs.*x, y.*b\.jsonl, line 2"):
        split(train=train, validation=other)
    with pytest.raises(DataError, match="'z' never occurs"):
        split(train=train, validation=train, test=other)


def test_held_out_rows_keep_equal_texts_together(write: Write) -> None:
    found, _ = split(train=write("a.jsonl", rows(*(n % 2 for n in range(300))) * 2))
    train, validation = ({e.key for e in examples} for examples in (found.train, found.validation))
    assert train.isdisjoint(validation)
    assert 30 < len(found.validation) < 90
    assert len(found.train) + len(found.validation) == 600
    with pytest.raises(DataError, match="too few"):
        split(train=write("b.jsonl", rows(0)))


def test_rows_on_both_sides_are_counted(write: Write) -> None:
    said: list[str] = []
    train = write("a.jsonl", rows(0, 1, 0, 1))
    split(report=said.append, train=train, validation=write("b.jsonl", rows(0, 1)))
    assert said == ["2 of 2 validation rows stand among the training rows too; scores flatter"]


def test_majority(write: Write) -> None:
    train = write("a.jsonl", rows(0, 1, 1))
    found, task = split(train=train, validation=train)
    assert majority(found, task.task) == "1"
    found, task = split("regression", train=train, validation=train)
    assert majority(found, task.task) == pytest.approx(2 / 3)
    tags = write("c.jsonl", [{"words": "a b c", "tags": "X Y Y"}])
    found, task = split("tokens", train=tags, validation=tags)
    assert majority(found, task.task) == "Y"
