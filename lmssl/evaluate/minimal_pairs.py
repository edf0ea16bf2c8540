"""Minimal pairs: of two sentences that differ in one thing, the good one should be likelier.

Source: BLiMP (Warstadt et al. 2020) for causal models, by the sums of log-likelihoods; Zorro (Huebner et al. 2021) for
its files. A tie is no right answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmssl.errors import EvaluationError
from lmssl.evaluate.intervals import wilson
from lmssl.evaluate.questions import Question, Result, numbered_lines, objects, question_files, text_of
from lmssl.evaluate.reader import Asked, Reader, ties
from lmssl.evaluate.score import Scores
from lmssl.recipe.suite import MinimalPairsEvaluation


@dataclass(frozen=True)
class Pair:
    """Two sentences, and where they stand."""

    good: str
    bad: str
    paradigm: str
    place: str


def prepare_pairs(section: MinimalPairsEvaluation, reader: Reader) -> Question:
    """Read the files and make rows of their sentences.

    Raises:
        DataError: a path gives no file.
        EvaluationError: a file is empty or wrong, with file and line; a sentence is longer than the model reads.
    """
    where = f"evaluation {section.name!r}"
    pairs = list(read_pairs(section))
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    places = [pair.place for pair in pairs for _ in range(2)]
    texts = reader.texts(sentences, section.prefix, places, where=where)
    asked = Asked.of(reader, texts, within_word=section.within_word)
    return Question(section, asked.rows, lambda scores: _result(pairs, asked, scores), causal=reader.causal)


def read_pairs(section: MinimalPairsEvaluation) -> Iterator[Pair]:
    """The pairs of all files, in order.

    Raises:
        DataError: a path gives no file.
        EvaluationError: a file is empty, or a pair wrong; names file and line.
    """
    for path in question_files(section.path, section.name):
        found = _zorro(path) if path.endswith(".txt") else _jsonl(path, section)
        yield from found


def _jsonl(path: str, section: MinimalPairsEvaluation) -> Iterator[Pair]:
    for place, values in objects(path):
        good, bad = (text_of(values, field, place) for field in (section.good, section.bad))
        named = values.get(section.paradigm or "UID")
        if section.paradigm is not None:
            named = text_of(values, section.paradigm, place)
        yield Pair(good, bad, str(named) if named is not None else Path(path).name.partition(".")[0], place)


def _zorro(path: str) -> Iterator[Pair]:
    held: tuple[str, str] | None = None
    for place, line in numbered_lines(path):
        if held is None:
            held = (line.strip(), place)
            continue
        yield Pair(line.strip(), held[0], Path(path).stem, held[1])
        held = None
    if held is not None:
        raise EvaluationError(
            "the last sentence has no partner",
            where=held[1],
            remedy="a .txt file holds two lines a pair, the bad sentence first; other formats are .jsonl",
        )


def _result(pairs: Sequence[Pair], asked: Asked, scores: Scores) -> Result:
    likelihoods = asked.log_likelihoods(scores.nats)
    counts: dict[str, list[int]] = {}  # asked, right, ties
    for number, pair in enumerate(pairs):
        good, bad = float(likelihoods[2 * number]), float(likelihoods[2 * number + 1])
        tie = ties(good, bad)
        of_paradigm = counts.setdefault(pair.paradigm, [0, 0, 0])
        for index, value in enumerate((1, good > bad and not tie, tie)):
            of_paradigm[index] += int(value)
    parts = {paradigm: shares(*counted) for paradigm, counted in counts.items()}
    total = shares(*(sum(counted[index] for counted in counts.values()) for index in range(3)))
    mean = sum(num_right / num_asked for num_asked, num_right, _ in counts.values()) / len(parts)
    return Result({**total, "mean_accuracy": mean, "num_paradigms": len(parts)}, parts)


def shares(num_asked: int, num_right: int, num_ties: int) -> dict[str, float | None]:
    """Accuracy with its 95 % interval, and counts."""
    low, high = wilson(num_right, num_asked)
    accuracy = num_right / num_asked
    return {"accuracy": accuracy, "low": low, "high": high, "num_asked": num_asked, "num_ties": num_ties}
