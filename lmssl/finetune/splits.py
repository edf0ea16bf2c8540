"""The rows of a task in their splits: the labels there are, and everything that would make a score meaningless."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import xxhash

from lmssl.errors import DataError
from lmssl.finetune.rows import Example, read_examples
from lmssl.finetune.task import Classification, Regression, TaskFile, Tokens


@dataclass(frozen=True)
class Splits:
    """What is learned from, what rates are chosen by, and what nothing is chosen by."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example] | None
    labels: tuple[str, ...]
    """Of the training rows, whole numbers by size and other labels by name; empty for numbers and instructions."""

    def scored(self) -> dict[str, Sequence[Example]]:
        """The splits that are scored, by name."""
        return {"validation": self.validation} | ({} if self.test is None else {"test": self.test})

    def fingerprint(self) -> str:
        """A hash of all rows, in their order and splits."""
        found = xxhash.xxh3_128()
        for split, examples in {"train": self.train, **self.scored()}.items():
            for example in examples:
                found.update(orjson.dumps((split, example.given, example.answer)))
        return found.hexdigest()


def read_splits(task: TaskFile, report: Callable[[str], None]) -> Splits:
    """Read and check all rows of a task.

    Raises:
        DataError: a file or row is wrong, there is only one label, or an evaluation row has an unknown one.
    """
    data = task.data
    train = read_examples(Path(data.train), task.task)
    if data.validation is None:
        train, validation = _held_out(train, data.validation_ratio, where=data.train)
    else:
        validation = read_examples(Path(data.validation), task.task)
    test = None if data.test is None else read_examples(Path(data.test), task.task)
    labels = labels_of(train) if isinstance(task.task, Classification | Tokens) else ()
    splits = Splits(train, validation, test, labels)
    check_splits(splits, task, report)
    return splits


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Every label or tag that occurs, whole numbers by size and before the others."""
    found = {x for e in examples for x in ((e.answer,) if isinstance(e.answer, str) else e.answer)}
    return tuple(
        sorted(found, key=lambda label: (not _is_number(label), int(label) if _is_number(label) else 0, label))
    )


def check_splits(splits: Splits, task: TaskFile, report: Callable[[str], None]) -> None:
    """Refuse what cannot be learned or scored; report texts that stand on both sides.

    Raises:
        DataError: as for `read_splits`.
    """
    where = task.data.train
    if isinstance(task.task, Classification | Tokens):
        name = task.task.label if isinstance(task.task, Classification) else task.task.tags
        if len(splits.labels) == 1:
            raise DataError(
                f"every row has the same {name}: {splits.labels[0]!r}",
                where=where,
                remedy="give rows of at least two, or name another field; there is nothing to tell apart",
            )
        for examples in splits.scored().values():
            _check_known(examples, splits.labels, where)
    if isinstance(task.task, Regression):
        for examples in (splits.train, *splits.scored().values()):
            if len({example.answer for example in examples}) == 1:
                raise DataError(
                    f"every row has the same number: {examples[0].answer:g}",
                    where=examples[0].where,
                    remedy="give rows with different ones; a constant has no correlation",
                )
    seen = {example.key for example in splits.train}
    for split, examples in splits.scored().items():
        count = sum(example.key in seen for example in examples)
        if count:
            report(f"{count:,} of {len(examples):,} {split} rows stand among the training rows too; scores flatter")


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def _check_known(examples: Sequence[Example], labels: tuple[str, ...], where: str) -> None:
    known = set(labels)
    for example in examples:
        answers = (example.answer,) if isinstance(example.answer, str) else example.answer
        unknown = next((answer for answer in answers if answer not in known), None)
        if unknown is not None:
            names = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
            raise DataError(
                f"the label {unknown!r} never occurs in the training rows; they have {names}",
                where=example.where,
                remedy=f"add rows with it to {where}, or remove this one",
            )


def _held_out(examples: Sequence[Example], ratio: float, *, where: str) -> tuple[list[Example], list[Example]]:
    """Training rows, and those whose text's hash falls below `ratio`: equal texts stay together."""
    limit = ratio * 2**64
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[xxhash.xxh3_64_intdigest(example.key.encode()) < limit].append(example)
    if not sides[0] or not sides[1]:
        raise DataError(
            f"{len(examples)} rows are too few to hold {ratio:.0%} of them out",
            where=where,
            remedy="name a file in data.validation, or raise data.validation_ratio",
        )
    return sides


def majority(splits: Splits, asked: object) -> object:
    """What is right most often in the training rows: a label, a tag, or the mean number; None for instructions."""
    if isinstance(asked, Classification):
        return Counter(example.answer for example in splits.train).most_common(1)[0][0]
    if isinstance(asked, Tokens):
        return Counter(tag for example in splits.train for tag in example.answer).most_common(1)[0][0]
    if isinstance(asked, Regression):
        return sum(example.answer for example in splits.train) / len(splits.train)
    return None
