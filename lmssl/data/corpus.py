"""Units -> chunks of documents, and plain texts for whoever needs no tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lmssl.data.order import permutation
from lmssl.data.readers import read_part
from lmssl.data.records import BadRecord, Item, Record, wrong_field
from lmssl.data.token_files import tokenizer_name
from lmssl.data.units import Unit, empty_corpus, list_units
from lmssl.errors import DataError
from lmssl.recipe.data import AnyCorpus

__all__ = [
    "ChunkText",
    "Document",
    "Unit",
    "check_first_record",
    "cut_sections",
    "list_units",
    "mixture_weights",
    "read_chunks",
    "read_texts",
    "source_notes",
    "too_many_bad",
]


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with its source."""

    raw: bytes
    """The text in UTF-8."""
    part: int
    """Which part of the unit it comes from."""
    record: int
    """Record within the part."""
    start: int
    """Where that record starts in its source, see `Record.start`."""
    offset: int
    """The byte of the record's text at which this document starts; 0 unless the record was cut into sections."""

    @property
    def text(self) -> str:
        """The text, decoded."""
        return self.raw.decode()

    @property
    def num_bytes(self) -> int:
        """Bytes of the text."""
        return len(self.raw)


@dataclass(frozen=True, eq=False)
class ChunkText:
    """The documents of a chunk before tokenization."""

    documents: list[Document]
    bad: list[tuple[int, BadRecord]]
    """Unreadable records, each with its part."""
    num_empty: int
    """Documents of whitespace alone, left out."""
    is_last: bool
    """No chunk of the unit follows."""


def read_chunks(unit: Unit, *, max_bad_records: int) -> Iterator[ChunkText]:
    """Read a unit from its start.

    Raises:
        DataError: the source cannot be read, or a chunk has more than `max_bad_records` bad records.
    """
    held: list[Document] = []
    bad: list[tuple[int, BadRecord]] = []
    num_empty, num_bytes = 0, 0
    for number, item in _items(unit):
        if isinstance(item, BadRecord):
            bad.append((number, item))
            if len(bad) > max_bad_records:
                raise too_many_bad(unit.corpus, unit.parts[bad[0][0]].path, bad[0][1], max_bad_records)
            continue
        for document in _documents(item, number, unit.form.section_bytes):
            if unit.chunk_bytes is not None and num_bytes >= unit.chunk_bytes:
                yield ChunkText(held, bad, num_empty, is_last=False)
                held, bad, num_empty, num_bytes = [], [], 0, 0
            if _is_blank(document.raw):
                num_empty += 1
            else:
                held.append(document)
                num_bytes += document.num_bytes
    yield ChunkText(held, bad, num_empty, is_last=True)


def read_texts(
    corpora: Sequence[AnyCorpus],
    *,
    max_bytes: int | None = None,
    max_document_bytes: int | None = None,
    seed: int = 0,
    max_bad_records: int = 100,
) -> Iterator[str]:
    """Texts of several corpora, each at most once, interleaved so that bytes follow the weights.

    Corpora without weights count by their size. Units come in a seeded order; a corpus that runs out leaves the
    rest to the others. Longer documents are shortened to `max_document_bytes`.

    Raises:
        DataError: see `list_units` and `read_chunks`; or a corpus holds no text.
    """
    units = [list_units(corpus) for corpus in corpora]
    for listed in units:
        check_first_record(listed)
    weights = mixture_weights(corpora, units)
    texts = {i: _corpus_texts(listed, seed, max_bad_records) for i, listed in enumerate(units)}
    given = [0] * len(corpora)
    while texts and (max_bytes is None or sum(given) < max_bytes):
        behind = min(texts, key=lambda i: (given[i] / weights[i], i))
        raw = next(texts[behind], None)
        if raw is None:
            if not given[behind]:
                raise empty_corpus(corpora[behind].name)
            del texts[behind]
            continue
        raw = raw[:max_document_bytes]
        given[behind] += len(raw)
        yield raw.decode(errors="ignore")  # the cut may fall inside a character


def mixture_weights(corpora: Sequence[AnyCorpus], units: Sequence[Sequence[Unit]]) -> list[float | int]:
    """The weight of each corpus as written, or its bytes of text where none is.

    Raises:
        DataError: there are several corpora without weights and the size of one is unknown.
    """
    weights: list[float | int] = []
    for corpus, listed in zip(corpora, units, strict=True):
        if corpus.weight is not None:
            weights.append(corpus.weight)
            continue
        weight = sum(unit.num_bytes for unit in listed)
        if not weight and len(corpora) > 1:
            raise DataError(
                "the corpus has no weight, and its size is not known in advance",
                where=f"data.mixture, corpus {corpus.name!r}",
                remedy="give every corpus of the mixture a weight",
            )
        weights.append(weight or 1)
    return weights


def check_first_record(units: Sequence[Unit]) -> None:
    """Look at one record: if a corpus's first lacks the text field, the field is misnamed.

    Raises:
        DataError: it names the fields found.
    """
    unit = units[0]
    if unit.form.kind not in ("jsonl", "datasets"):
        return  # parquet files were checked when they were listed, text has no fields
    number, first = next(_items(unit), (0, None))
    if isinstance(first, BadRecord) and first.fields is not None:
        where = f"corpus {unit.corpus!r}, {unit.parts[number].path}, first record"
        raise wrong_field(unit.form.field, first.fields, where, first.reason)


def source_notes(units: Sequence[Unit]) -> Iterator[str]:
    """Lines worth knowing about a corpus before it is read: which tokenizers made its ready-made tokens."""
    if units[0].form.kind != "tokens":
        return
    paths = {part.path for unit in units for part in unit.parts}
    if names := sorted({name for name in map(tokenizer_name, paths) if name is not None}):
        yield (
            f"corpus {units[0].corpus!r} was tokenized with {', '.join(names)}; that its ids mean the same to the "
            "run's tokenizer cannot be checked"
        )


def too_many_bad(corpus: str, path: str, first: BadRecord, allowed: int) -> DataError:
    """The error for more bad records than the recipe allows."""
    return DataError(
        f"corpus {corpus!r} has more than {allowed} unreadable records; one of them: {first.reason}",
        where=f"{path}, record {first.number} (at {first.start})",
        remedy="repair the file, or raise data.max_bad_records to leave such records out",
    )


def cut_sections(raw: bytes, section_bytes: int) -> list[tuple[int, bytes]]:
    """(offset, section) pairs that join to the text: near `section_bytes`, ending at a blank line if possible.

    `raw`: the text in UTF-8.
    """
    cuts = [0]
    while len(raw) - cuts[-1] > section_bytes * 3 // 2:
        cuts.append(_cut(raw, cuts[-1] + section_bytes // 2, cuts[-1] + section_bytes))
    cuts.append(len(raw))
    return [(a, raw[a:b]) for a, b in pairwise(cuts)]


def _cut(raw: bytes, low: int, high: int) -> int:
    for end in (b"\n\n", b"\n", b" "):
        found = raw.rfind(end, low, high)
        if found >= 0:
            return found + len(end)
    while high < len(raw) and raw[high] & 0xC0 == 0x80:  # not inside a character
        high += 1
    return high


def _items(unit: Unit) -> Iterator[tuple[int, Item]]:
    for number, part in enumerate(unit.parts):
        for item in read_part(unit.form, part):
            yield number, item


def _documents(record: Record, part: int, section_bytes: int | None) -> Iterator[Document]:
    if section_bytes is None or len(record.raw) <= section_bytes * 3 // 2:
        yield Document(record.raw, part, record.number, record.start, 0)
        return
    for offset, section in cut_sections(record.raw, section_bytes):
        yield Document(section, part, record.number, record.start, offset)


def _is_blank(raw: bytes) -> bool:
    if not raw or 0x20 < raw[0] < 0x7F:
        return not raw
    rest = raw.lstrip()
    # White space beyond ASCII is rare, and none of it begins with a printable ASCII byte.
    return not rest or (not (0x20 < rest[0] < 0x7F) and rest.decode().isspace())


def _corpus_texts(units: Sequence[Unit], seed: int, max_bad_records: int) -> Iterator[bytes]:
    num_bad = 0
    for i in permutation(len(units), seed, "texts", units[0].corpus):
        for number, item in _items(units[i]):
            if isinstance(item, Record):
                if not _is_blank(item.raw):
                    yield item.raw
                continue
            num_bad += 1
            if num_bad > max_bad_records:
                raise too_many_bad(units[i].corpus, units[i].parts[number].path, item, max_bad_records)
