"""Which documents contain text of evaluation files: word n-grams in common.

Normalisation: lower case, every character but letters, digits (`str.isalnum`) and white space removed, cut at white
space. A document overlaps if n words in a row of it are n words in a row of an evaluation document. An evaluation
document of fewer than n words counts as a whole, if it has at least `MIN_WORDS`; shorter ones are ignored.
Source: n-grams of 13 words in Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C; unlike there
the whole document is dropped, and n-grams that are frequent in the training text count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from lmssl.data.archive import COMPRESSED
from lmssl.data.chunk import Chunk, utf8_hash
from lmssl.data.columns import store_array, stored_array
from lmssl.data.corpus import Document, check_first_record
from lmssl.data.filters import Filters, HashArray, IntArray, documents_of, mix, training_documents
from lmssl.data.readers import read_part
from lmssl.data.records import BadRecord, changed
from lmssl.data.units import Unit, expand_paths, list_units
from lmssl.errors import DataError
from lmssl.recipe.data import DecontaminateSection, JsonlCorpus, ParquetCorpus, TextCorpus

MIN_WORDS = 5
_FORMAT = 1
_BATCH_BYTES = 4 << 20
_STEP = np.uint64(0x9E3779B97F4A7C15)
_NOT_IN_WORDS = re.compile(r"[^\w\s]|_")
_ASCII_NOT_IN_WORDS = bytes(i for i in range(128) if not (chr(i).isalnum() or chr(i).isspace()))
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
_WHERE = "data.filters.decontaminate.path"


@dataclass(frozen=True)
class Overlap:
    """A document that contains evaluation text."""

    document: int
    words: str
    """The first words in common."""


class EvaluationText:
    """The word n-grams of evaluation documents, ready to be looked for."""

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        documents = [words for text in texts if (words := normalised(text))]
        self.num_documents = len(documents)
        self.num_ignored = sum(len(words) < min(MIN_WORDS, ngram) for words in documents)
        """Documents too short to be looked for."""
        content = json.dumps([_FORMAT, ngram, MIN_WORDS, documents])
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        """Of what is looked for; not of the files' names."""
        self._marked: set[Path] = set()
        self._vocabulary: dict[str, int] = {}
        for word in chain.from_iterable(documents):
            self._vocabulary.setdefault(word, len(self._vocabulary))
        self._words = list(self._vocabulary)
        self._grams: dict[int, tuple[HashArray, IntArray]] = {}
        """By number of words: sorted hashes, and where in `_ids` each n-gram starts."""
        self._ids = self._numbered(documents)
        lengths = np.array([len(words) for words in documents], np.int64)
        starts = np.cumsum(lengths + 1) - lengths - 1
        wanted = {ngram: np.arange(len(self._ids))}
        for length in range(MIN_WORDS, ngram):
            wanted[length] = starts[lengths == length]
        for length, hashes in _rolling(self._ids, sorted(wanted)):
            at = np.intersect1d(wanted[length], _known_runs(self._ids, length), assume_unique=True)
            if len(at):
                order = np.argsort(hashes[at], kind="stable")
                self._grams[length] = hashes[at][order], at[order]

    @property
    def column(self) -> str:
        """What a chunk calls its column of overlaps with this text."""
        return f"overlap-{self.fingerprint}.npy"

    def find(self, texts: Sequence[str]) -> list[Overlap]:
        """The documents among `texts` that contain evaluation text, in order, each with the first words found."""
        ids = self._numbered([normalised(text) for text in texts])
        ends = np.flatnonzero(ids == -1)
        found: dict[int, tuple[int, int]] = {}
        for length, hashes in _rolling(ids, sorted(self._grams)):
            sought, origins = self._grams[length]
            runs = _known_runs(ids, length)
            left = np.searchsorted(sought, hashes[runs])
            hits = sought[np.minimum(left, len(sought) - 1)] == hashes[runs]
            columns = (np.searchsorted(ends, runs[hits]), runs[hits], left[hits])
            for document, place, first in zip(*(column.tolist() for column in columns), strict=True):
                if document in found and found[document] <= (place, length):
                    continue
                same = slice(first, np.searchsorted(sought, hashes[place], side="right"))
                if any(
                    np.array_equal(self._ids[at : at + length], ids[place : place + length]) for at in origins[same]
                ):
                    found[document] = place, length
        return [
            Overlap(document, " ".join(self._words[i] for i in ids[place : place + length]))
            for document, (place, length) in sorted(found.items())
        ]

    def is_marked(self, chunk: Chunk) -> bool:
        """Whether the chunk's column is there and whole; a column is read once."""
        if chunk.path not in self._marked:
            if stored_array(chunk.path / self.column) is None:
                return False
            self._marked.add(chunk.path)
        return True

    def mark(self, chunk: Chunk, corpus: str, documents: Sequence[Document], check: Callable[[], None]) -> None:
        """Write beside a chunk which of its documents contain evaluation text, and beside that why, as JSON lines.

        The column counts documents of both sides of the split. `check` is called between batches and may raise.

        Raises:
            DataError: the documents are not those the chunk was made of.
        """
        hashes = [utf8_hash(document.raw) for document in documents]
        if hashes != chunk.documents()["text_hash"].tolist():
            raise changed(", ".join(chunk.meta.sources[:5]))
        column, lines = np.zeros(len(documents), np.uint8), []
        for first, batch in _batches(documents):
            check()
            for overlap in self.find([document.text for document in batch]):
                document = batch[overlap.document]
                column[first + overlap.document] = 1
                place = {"record": document.record, "start": document.start, "offset": document.offset}
                source = {"corpus": corpus, "file": chunk.meta.sources[document.part]}
                lines.append(json.dumps({**source, **place, "words": overlap.words}, ensure_ascii=False) + "\n")
        (chunk.path / self.column).with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
        store_array(chunk.path / self.column, column)  # last: it says that the chunk was compared

    def _numbered(self, documents: Sequence[Sequence[str]]) -> IntArray:
        """Numbers of the words, -2 for those that evaluation text lacks, and -1 after each document."""
        numbers: list[int] = []
        for words in documents:
            numbers.extend(map(self._vocabulary.get, words, repeat(-2)))
            numbers.append(-1)
        return np.array(numbers, np.int64)


def _batches(documents: Sequence[Document]) -> Iterator[tuple[int, list[Document]]]:
    """Runs of documents, each with the index of its first."""
    first, num_bytes = 0, 0
    for index, document in enumerate(documents, 1):
        num_bytes += document.num_bytes
        if num_bytes >= _BATCH_BYTES or index == len(documents):
            yield first, list(documents[first:index])
            first, num_bytes = index, 0


def dropped_overlaps(chunk: Chunk, column: str, seed: int, held_out_ratio: float) -> Iterator[dict[str, Any]]:
    """The training documents of a chunk that contain evaluation text: file, record, start, offset and the first words.

    `words` is None where the file beside the column is gone that says why.

    Raises:
        DataError: the column is missing or damaged.
    """
    candidates = documents_of(chunk, seed, held_out_ratio, held_out=False)
    kept = training_documents(chunk, Filters(overlap_column=column), seed, held_out_ratio).kept
    words = _words((chunk.path / column).with_suffix(".jsonl"))
    for row in candidates.rows[candidates.kept & ~kept]:
        file, start, offset = chunk.meta.sources[int(row["part"])], int(row["start"]), int(row["offset"])
        place = {"file": file, "record": int(row["record"]), "start": start, "offset": offset}
        yield {**place, "words": words.get((file, start, offset))}


def _words(path: Path) -> dict[tuple[str, int, int], str]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(line["file"], line["start"], line["offset"]): line["words"] for line in lines}
    except (OSError, ValueError, KeyError):
        return {}


def normalised(text: str) -> list[str]:
    """The words that are compared."""
    # Deleting bytes is many times faster than the expression, and most of what goes is ASCII.
    rest = text.lower().encode().translate(None, _ASCII_NOT_IN_WORDS).decode()
    return (rest if rest.isascii() else _NOT_IN_WORDS.sub("", rest)).split()


def read_evaluation_text(section: DecontaminateSection, report: Callable[[str], None]) -> EvaluationText:
    """Read all evaluation files; `report` hears how many documents are too short to be looked for.

    Raises:
        DataError: no such file, a kind of file that is not read, an unreadable record, or no words at all.
    """
    units = [unit for corpus in _corpora(section) for unit in list_units(corpus)]
    found = EvaluationText(_texts(units), section.ngram)
    if found.num_documents == found.num_ignored:
        raise DataError(
            f"the evaluation files hold no text of {min(MIN_WORDS, section.ngram)} words or more",
            where=_WHERE,
            remedy="name files with evaluation text, or set data.filters.decontaminate: null",
        )
    if found.num_ignored:
        report(
            f"decontamination: {found.num_ignored} of {found.num_documents} evaluation documents have fewer than "
            f"{min(MIN_WORDS, section.ngram)} words and are not looked for"
        )
    return found


def _corpora(section: DecontaminateSection) -> Iterator[JsonlCorpus | ParquetCorpus | TextCorpus]:
    """One corpus per file: its kind follows from its name."""
    for path in expand_paths(section.path, "jsonl"):
        plain = path
        for ending in COMPRESSED:
            plain = plain.removesuffix(ending)
        kind = next((kind for ending, kind in _ENDINGS.items() if plain.endswith(ending)), None)
        if kind == "text":
            yield TextCorpus(name="evaluation", kind="text", path=path, section_bytes=None)
        elif kind == "jsonl":
            yield JsonlCorpus(name="evaluation", kind="jsonl", path=path, field=section.field)
        elif kind == "parquet":
            yield ParquetCorpus(name="evaluation", kind="parquet", path=path, field=section.field)
        else:
            raise DataError(
                "evaluation text is read from .jsonl, .parquet and .txt files",
                where=f"{_WHERE}: {path}",
                remedy="convert the file, or narrow the pattern",
            )


def _texts(units: Iterable[Unit]) -> Iterator[str]:
    for unit in units:
        check_first_record([unit])
        for part in unit.parts:
            for item in read_part(unit.form, part):
                if isinstance(item, BadRecord):
                    # Left out, it would let its text into the training.
                    raise DataError(
                        f"an evaluation record is unreadable: {item.reason}",
                        where=f"{part.path}, record {item.number} (at {item.start})",
                        remedy="repair the file, or name its text field in data.filters.decontaminate.field",
                    )
                yield item.text


def _rolling(ids: IntArray, lengths: Sequence[int]) -> Iterator[tuple[int, HashArray]]:
    """For each length, ascending, the hash of so many numbers from every place on that has them."""
    mixed = mix(ids.astype(np.uint64))
    hashes: HashArray = np.zeros(len(ids), np.uint64)
    done = 0
    for length in lengths:
        while done < length:
            count = max(0, len(ids) - done)
            hashes = hashes[:count] * _STEP + mixed[done:]
            done += 1
        yield length, hashes


def _known_runs(ids: IntArray, length: int) -> IntArray:
    """Where so many numbers from a place on are words of one document that evaluation text knows."""
    unknown = np.concatenate([[0], np.cumsum(ids < 0)])
    return np.flatnonzero(unknown[length:] == unknown[: max(0, len(unknown) - length)])
