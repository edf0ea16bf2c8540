from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.chunk import text_hash
from lmssl.data.filters import is_held_out
from lmssl.data.search import Match, search
from lmssl.data.stream import SequenceStream
from lmssl.data.trace import Tracer
from lmssl.recipe.data import JsonlCorpus
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]


def found_by(stream: SequenceStream, tokenizer: Tokenizer, text: str, limit: int = 1000) -> tuple[list[Match], bool]:
    return search(stream, text, finder=Tracer(stream, tokenizer).finder, limit=limit, report=lambda _: None)


def holders(stream: SequenceStream, tokenizer: Tokenizer) -> dict[tuple[str, int], list[int]]:
    """By (corpus, record): positions of the first epoch with a segment of it, found by tracing all of them."""
    counts = stream.num_sequences_per_epoch()
    last = max(stream.order.position_of(corpus, count - 1) or 0 for corpus, count in counts.items())
    found = defaultdict(list)
    for sequence in Tracer(stream, tokenizer).sequences(range(last + 1)):
        for segment in sequence.segments:
            held = found[segment.corpus, segment.record]
            if sequence.epoch == 0 and sequence.position not in held:
                held.append(sequence.position)
    return found


def test_found_positions_are_those_that_hold_the_document(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer
) -> None:
    stream = open_stream(jsonl("a", 150, weight=3.0), jsonl("b", 90, seed=1, weight=1.0), sequence_length=32)
    matches, more = found_by(stream, tokenizer, "-")
    assert not more and len(matches) == 240
    expected = holders(stream, tokenizer)
    documents = {"a": texts(150), "b": texts(90, 1)}
    num_cut = 0
    for match in matches:
        text = documents[match.corpus][match.document.record]
        assert match.document.text == text
        assert (match.document.byte_start, match.document.byte_end) == (0, len(text.encode()))
        (held_out,) = is_held_out(_hashes([text]), stream.layout.seed, stream.layout.held_out_ratio)
        assert match.split == ("validation" if held_out else "train")
        assert list(match.positions) == expected[match.corpus, match.document.record]
        num_cut += len(match.positions) > 1
    assert num_cut > 10
    assert sum(match.split == "validation" for match in matches) > 5


def test_only_documents_with_the_text_are_found_case_sensitively(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer
) -> None:
    stream = open_stream(jsonl())
    wanted = {i for i, text in enumerate(texts(400)) if "moon winter" in text}
    matches, _ = found_by(stream, tokenizer, "moon winter")
    assert {match.document.record for match in matches} == wanted and wanted
    assert found_by(stream, tokenizer, "Moon Winter") == ([], False)


def test_no_match_builds_nothing(open_stream: Open, jsonl: Any, tokenizer: Tokenizer) -> None:
    stream = open_stream(jsonl())
    assert found_by(stream, tokenizer, "nowhere") == ([], False)
    assert stream.ledger.entries("tales") == []


@pytest.mark.parametrize(("limit", "more"), [(1, True), (239, True), (240, False), (241, False)])
def test_the_list_ends_at_its_limit_and_says_so(
    open_stream: Open, jsonl: Any, tokenizer: Tokenizer, limit: int, more: bool
) -> None:
    stream = open_stream(jsonl("a", 150, weight=3.0), jsonl("b", 90, seed=1, weight=1.0))
    matches, found_more = found_by(stream, tokenizer, "-", limit)
    assert len(matches) == min(limit, 240) and found_more is more


def test_a_section_is_a_document(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    text = "\n\n".join(texts(60))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": text}) + "\n", encoding="utf-8")
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path), section_bytes=500)
    stream = open_stream(corpus, validation=None)
    ((match,), _) = found_by(stream, tokenizer, "0-41 ")
    document = match.document
    assert document.record == 1 and document.byte_start > 500
    assert text.encode()[document.byte_start : document.byte_end].decode() == document.text
    for sequence in Tracer(stream, tokenizer).sequences(match.positions):
        spans = [(s.byte_start, s.byte_end) for s in sequence.segments if s.record == 1]
        assert any(document.byte_start <= begin < end <= document.byte_end for begin, end in spans)


def test_a_dropped_document_is_in_no_sequence(open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer) -> None:
    stream = open_stream(jsonl(), filters={"max_tokens": 40}, validation=None)
    longest = max(range(400), key=lambda i: len(texts(400)[i]))
    ((match,), _) = found_by(stream, tokenizer, f"0-{longest} ")
    assert (match.split, match.positions) == (None, ())


def test_validation_sets_are_searched_too(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    exam = str(jsonl("exam", 60, seed=3).path)
    sets = [{"name": "exam", "kind": "jsonl", "path": exam}]
    stream = open_stream(jsonl("a", 90), validation={"ratio": 0.1, "tokens": 1500, "sets": sets}, sequence_length=32)
    matches, more = found_by(stream, tokenizer, "-")
    assert not more and [match.corpus for match in matches] == ["a"] * 90 + ["exam"] * 60
    (split,) = stream.validation_sets()
    expected = defaultdict(list)
    for sequence in Tracer(stream, tokenizer).in_set("exam", range(split.num_sequences)):
        for record in dict.fromkeys(segment.record for segment in sequence.segments):
            expected[record].append(sequence.position)
    assert 10 < len(expected) < 60 and any(len(held) > 1 for held in expected.values())
    documents = texts(60, 3)
    for match in matches[90:]:
        held = expected.get(match.document.record, [])
        assert match.document.text == documents[match.document.record]
        assert (match.split, list(match.positions), match.epoch) == ("exam" if held else None, held, None)
    assert {(match.split, match.epoch) for match in matches[:90]} == {("train", 0), ("validation", None)}


def test_a_text_in_no_document_builds_no_validation_set(open_stream: Open, jsonl: Any, tokenizer: Tokenizer) -> None:
    sets = [{"name": "exam", "kind": "jsonl", "path": str(jsonl("exam", 60, seed=3).path)}]
    stream = open_stream(jsonl("a", 90), validation={"ratio": 0.1, "tokens": 1500, "sets": sets})
    assert found_by(stream, tokenizer, "nowhere") == ([], False) and stream._found_sets is None


def _hashes(found: list[str]) -> Any:
    import numpy as np

    return np.array([text_hash(text) for text in found], dtype=np.uint64)
