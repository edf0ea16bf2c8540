import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError

Open = Callable[..., SequenceStream]


def text_of(stream: SequenceStream, tokenizer: Any) -> str:
    (split,) = stream.validation_sets()
    rows = (split.sequence(index) for index in range(split.num_sequences))
    return "".join(tokenizer.backend.decode(row.ids_T[row.segments_T > 0].tolist()) for row in rows)


def settings(path: Path, tokens: int, **keys: Any) -> dict[str, Any]:
    return {"ratio": 0.1, "tokens": tokens, "sets": [{"name": "exam", "kind": "jsonl", "path": str(path), **keys}]}


def test_a_set_is_read_whole_and_changes_nothing_else(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Any, tmp_path: Path
) -> None:
    documents = [text.replace(" ", "_") for text in texts(40, seed=9)]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    corpus = jsonl("a")
    plain = open_stream(corpus)
    stream = open_stream(corpus, validation=settings(tmp_path / "exam.jsonl", 10**6, field="body"))
    assert [split.corpus for split in stream.validation_sets()] == ["exam"]
    found = text_of(stream, tokenizer)
    assert sum(map(len, documents)) == len(found)
    assert all(text in found for text in documents if len(text) < 30)
    assert stream.validation_sets()[0].num_bytes == sum(len(text.encode()) for text in documents)
    assert [split.corpus for split in stream.validation()] == ["a"]
    assert stream.ledger_at(20).text() == plain.ledger_at(20).text()
    assert plain.validation_sets() == () == open_stream(corpus, validation=None).validation_sets()


def test_a_set_is_cut_at_the_budget(open_stream: Open, jsonl: Any) -> None:
    path = Path(str(jsonl("exam", seed=3).path))
    (split,) = open_stream(jsonl("a"), validation=settings(path, 500)).validation_sets()
    assert split.num_tokens == 500


def test_a_set_that_is_missing_or_misnamed_stops_at_once(open_stream: Open, jsonl: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_stream(jsonl("a"), validation=settings(tmp_path / "none.jsonl", 500))
    path = Path(str(jsonl("exam").path))
    with pytest.raises(DataError, match="body"):
        open_stream(jsonl("a"), validation=settings(path, 500, field="body"))


def test_a_set_without_text(open_stream: Open, jsonl: Any, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    stream = open_stream(jsonl("a"), validation=settings(tmp_path / "blank.jsonl", 500))
    with pytest.raises(DataError, match="validation set 'exam' holds no text") as caught:
        stream.validation_sets()
    assert caught.value.remedy
