"""Labels that come free: the author of a passage, the type of a PEP, parts of speech. Used by bench_transfer.py."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from transfer_text import body_of, passages, shingles

from lmssl.finetune.rows import Example

MIN_BOOKS, NUM_AUTHORS = 5, 10
"""An author of the task has so many books at least; every third of them is held out whole."""
NUM_POOL, NUM_VALIDATION, NUM_TEST = 2000, 200, 1000


@dataclass(frozen=True)
class LabelledSet:
    """A task: rows to draw labels from, rows to choose rates by, rows that are scored."""

    kind: str
    metric: str
    pool: list[Example]
    validation: list[Example]
    test: list[Example]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a compressed file."""
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def chosen_authors(corpora: Path) -> dict[str, list[str]]:
    """The authors of the task and their books, those with the most books first."""
    books = defaultdict(list)
    for row in read_jsonl(corpora / "books.jsonl.zst"):
        books[row["author"]].append(row["id"])
    able = sorted(
        (name for name in books if name != "Anonymous" and len(books[name]) >= MIN_BOOKS),
        key=lambda n: (-len(books[n]), n),
    )
    return {name: sorted(books[name]) for name in able[:NUM_AUTHORS]}


def authors(corpora: Path, seed: int) -> LabelledSet:
    """Who wrote a passage of about 100 words; the books of the test rows are in no other rows."""
    known = chosen_authors(corpora)
    sides: dict[bool, dict[str, list[Example]]] = {False: defaultdict(list), True: defaultdict(list)}
    for row in read_jsonl(corpora / "books.jsonl.zst"):
        name = row["author"]
        if name in known:
            number = known[name].index(row["id"])
            for index, text in enumerate(passages(row["text"])):
                sides[number % 3 == 2][name].append(Example(text, name, f"{row['id']}, passage {index}"))
    draw = random.Random(seed)
    rows = {}
    for held_out, total in ((False, NUM_POOL + NUM_VALIDATION), (True, NUM_TEST)):
        each = total // len(known)
        rows[held_out] = [
            e for name in known for e in draw.sample(sides[held_out][name], min(each, len(sides[held_out][name])))
        ]
        draw.shuffle(rows[held_out])
    # Collections repeat stories: a test passage with eight words in a row of another side's passage is left out.
    seen = {words for e in rows[False] for words in shingles(e.given)}
    test = [e for e in rows[True] if seen.isdisjoint(shingles(e.given))]
    cut = len(rows[False]) * NUM_VALIDATION // (NUM_POOL + NUM_VALIDATION)
    return LabelledSet("classification", "accuracy", rows[False][cut:], rows[False][:cut], test)


def pep_types(corpora: Path, seed: int) -> LabelledSet:
    """Whether a PEP is about standards, information or process, from its text below the header."""
    rows = []
    for row in read_jsonl(corpora / "peps.jsonl.zst"):
        found = re.search(r"^Type:\s*(Standards Track|Informational|Process)\s*$", row["text"], flags=re.M)
        if found:
            rows.append(Example(body_of(row["text"]), found[1], row["id"]))
    random.Random(seed).shuffle(rows)
    first, second = len(rows) // 2, len(rows) * 6 // 10
    return LabelledSet("classification", "macro_f1", rows[:first], rows[first:second], rows[second:])


def parts_of_speech(corpora: Path, seed: int) -> LabelledSet:
    """The universal part of speech of every word of a sentence of English web text."""
    parts = {name: list(_sentences(corpora / f"ud_ewt/{name}.conllu")) for name in ("dev", "test")}
    random.Random(seed).shuffle(parts["dev"])
    return LabelledSet(
        "tokens", "accuracy", parts["dev"][NUM_VALIDATION:], parts["dev"][:NUM_VALIDATION], parts["test"]
    )


def _sentences(path: Path) -> Iterator[Example]:
    for number, block in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
        # 8-9 is a token of two words, 8.1 an omitted one.
        rows = [line.split("\t") for line in block.splitlines() if re.match(r"\d+\t", line)]
        rows = [row for row in rows if row[1].strip() and " " not in row[1]]
        if rows:
            yield Example(
                tuple(row[1] for row in rows), tuple(row[3] for row in rows), f"{path.name}, sentence {number}"
            )


TASKS = {"authors": authors, "pep_types": pep_types, "parts_of_speech": parts_of_speech}
