"""Multiple choice: the right continuation of a question should be the likeliest.

Two accuracies: by the sum of a choice's log-likelihoods, and by the sum divided by the bytes of the choice.

Source: lm-evaluation-harness's `acc` and `acc_norm` (Gao et al. 2021); differs in that ties are no right answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmssl.errors import EvaluationError
from lmssl.evaluate.intervals import wilson
from lmssl.evaluate.questions import Question, Result, field_of, objects, question_files, text_of
from lmssl.evaluate.reader import Asked, Reader, Text, ties
from lmssl.evaluate.score import IntArray, Scores
from lmssl.recipe.suite import MultipleChoiceEvaluation


@dataclass(frozen=True)
class Choice:
    """A question with its choices."""

    question: str
    choices: tuple[str, ...]
    answer: int
    place: str


def prepare_choices(section: MultipleChoiceEvaluation, reader: Reader) -> Question:
    """Read the files and make rows of every choice.

    Raises:
        DataError: a path gives no file.
        EvaluationError: a file is empty or wrong, with file and line; a text is longer than the model reads.
    """
    asked = list(read_choices(section))
    texts = _texts(section, reader, asked)
    rows = Asked.of(reader, texts, within_word=section.within_word)
    return Question(section, rows.rows, lambda scores: _result(asked, rows, scores), causal=reader.causal)


def read_choices(section: MultipleChoiceEvaluation) -> Iterator[Choice]:
    """The questions of all files, in order.

    Raises:
        DataError: a path gives no file.
        EvaluationError: a file is empty, or a question wrong; names file and line.
    """
    for path in question_files(section.path, section.name):
        for place, values in objects(path):
            if isinstance(section.choices, str):
                given = field_of(values, section.choices, place)
                fields = {f"{section.choices}.{i}": v for i, v in enumerate(given if isinstance(given, list) else [])}
            else:
                fields = {name: field_of(values, name, place) for name in section.choices}
            choices = tuple(text_of(fields, name, place) for name in fields)
            if len(choices) < 2:
                raise EvaluationError(
                    f"the field {section.choices!r} holds no list of two or more texts",
                    where=place,
                    remedy="repair the line, or name the field of the choices in the suite",
                )
            answer = _answer(field_of(values, section.answer, place), choices, place)
            yield Choice(text_of(values, section.question, place), choices, answer, place)


def _answer(given: Any, choices: tuple[str, ...], place: str) -> int:
    if isinstance(given, str) and choices.count(given) == 1:
        return choices.index(given)
    number = given
    if isinstance(given, str) and len(given) == 1 and given.isascii() and given.isalpha():
        number = ord(given.upper()) - ord("A")
    elif isinstance(given, str) and given.isdecimal():
        number = int(given)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise EvaluationError(
            f"the answer {given!r} is none of the {len(choices)} choices",
            where=place,
            remedy=f"give its number (0 to {len(choices) - 1}), its letter or its text",
        )
    return number


def _texts(section: MultipleChoiceEvaluation, reader: Reader, asked: Sequence[Choice]) -> list[Text]:
    before, behind = reader.around(section.prefix, where=f"evaluation {section.name!r}")
    questions = reader.encode([choice.question for choice in asked])
    wholes = [choice.question + section.separator + text for choice in asked for text in choice.choices]
    found = iter(reader.encode(wholes))
    texts = []
    for choice, question in zip(asked, questions, strict=True):
        for _ in choice.choices:
            ids = next(found)
            # Tokens may reach across the end of the question; then the choice begins with the first that does.
            texts.append(reader.text(ids, before, behind, _common(question, ids), choice.place))
    return texts


def _common(first: IntArray, second: IntArray) -> int:
    """Tokens at the beginning that two texts share; the second keeps at least one."""
    length = min(len(first), len(second) - 1)
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def _result(asked: Sequence[Choice], rows: Asked, scores: Scores) -> Result:
    likelihoods = iter(rows.log_likelihoods(scores.nats).tolist())
    num_right, num_right_by_byte, num_ties = 0, 0, 0
    for choice in asked:
        sums = [next(likelihoods) for _ in choice.choices]
        by_byte = [value / len(text.encode()) for value, text in zip(sums, choice.choices, strict=True)]
        num_right += _is_right(sums, choice.answer)
        num_right_by_byte += _is_right(by_byte, choice.answer)
        best = max(sums)
        num_ties += sum(ties(value, best) for value in sums) > 1
    (low, high), (low_by_byte, high_by_byte) = (wilson(n, len(asked)) for n in (num_right, num_right_by_byte))
    return Result(
        {
            "accuracy": num_right / len(asked),
            "low": low,
            "high": high,
            "accuracy_by_byte": num_right_by_byte / len(asked),
            "low_by_byte": low_by_byte,
            "high_by_byte": high_by_byte,
            "num_asked": len(asked),
            "num_ties": num_ties,
        }
    )


def _is_right(values: Sequence[float], answer: int) -> bool:
    others = (value for number, value in enumerate(values) if number != answer)
    return all(values[answer] > value and not ties(values[answer], value) for value in others)
