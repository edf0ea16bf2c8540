from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmssl.data.chunk import text_hash
from lmssl.data.filters import is_held_out
from lmssl.data.statistics import Statistics, measure
from lmssl.data.stream import SequenceStream
from lmssl.recipe.data import JsonlCorpus, TokensCorpus
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]


def test_counts_equal_those_of_the_texts(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    documents = texts(300)
    lines = [json.dumps({"text": text}) for text in documents]
    lines[100:100] = ["no JSON", json.dumps({"text": " \n "}), json.dumps({"text": ""}), "{}"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stream = open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path)))
    heard: list[Statistics] = []
    found = measure(stream, "a", heard.append)

    hashes = np.array([text_hash(text) for text in documents], dtype=np.uint64)
    held_out = is_held_out(hashes, 7, 0.1)
    trained = [text for text, out in zip(documents, held_out, strict=True) if not out]
    lengths = [len(tokenizer.backend.encode(text, add_special_tokens=False).ids) + 1 for text in trained]
    assert found.num_documents == len(trained) < 300
    assert found.num_tokens == sum(lengths)
    assert found.num_bytes == sum(len(text.encode()) for text in trained)
    assert found.num_sequences == stream.num_sequences_per_epoch()["a"]
    assert found.num_padding_tokens == found.num_sequences * 64 - sum(lengths)
    assert found.num_cut_documents == sum(length > 64 for length in lengths) > 0
    assert (found.num_bad_records, found.num_empty_documents) == (2, 2)
    assert found.num_held_out_documents == held_out.sum() > 0
    assert found.bytes_per_token == found.num_bytes / sum(lengths)
    assert found.padding_ratio == found.num_padding_tokens / (found.num_sequences * 64)
    assert found.cut_documents_ratio == found.num_cut_documents / len(trained)
    expected = Counter(length.bit_length() for length in lengths)
    assert {low: count for low, _, count in found.bins() if count} == {1 << i >> 1: n for i, n in expected.items()}
    assert all(high == 2 * low - 1 for low, high, _ in found.bins())
    assert heard[-1] == found and len(heard) == len(stream.ledger.entries("a"))


def test_sums_of_corpora(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(jsonl("a", 50, weight=1.0), jsonl("b", 90, seed=1, weight=1.0), filters={"min_tokens": 20})
    one, two = (measure(stream, corpus, lambda _: None) for corpus in "ab")
    both = sum([one, two], Statistics())
    assert both.num_documents + both.num_held_out_documents + both.num_dropped_documents == 140
    assert both.num_dropped_short == both.num_dropped_documents > 0
    assert both.num_sequences == sum(stream.num_sequences_per_epoch().values())
    assert sum(count for _, _, count in both.bins()) == both.num_documents
    values = both.to_json()
    assert values["num_sequences_per_epoch"] == both.num_sequences
    assert values["length_histogram"][0]["documents"] == both.bins()[0][2]
    json.dumps(values)


def test_nothing_has_no_bins() -> None:
    assert Statistics().bins() == [] and Statistics().to_json()["bytes_per_token"] is None


def test_tokens_whose_text_is_unknown_do_not_lower_bytes_per_token(
    open_stream: Open, jsonl: Any, tmp_path: Path
) -> None:
    np.full(5000, 40, "<u2").tofile(tmp_path / "made.ds")
    np.arange(50, 5001, 50).astype("<u8").tofile(tmp_path / "made.ds.index")
    made = TokensCorpus(name="made", kind="tokens", path=str(tmp_path / "made.ds"), weight=1.0)
    stream = open_stream(jsonl("a", 90, weight=1.0), made, validation=None)
    text, tokens = (measure(stream, corpus, lambda _: None) for corpus in ("a", "made"))
    assert text.bytes_per_token == text.num_bytes / text.num_tokens > 1
    assert tokens.num_tokens == 100 * 51 and tokens.to_json()["bytes_per_token"] is None
    both = text + tokens
    assert both.num_tokens == text.num_tokens + tokens.num_tokens
    assert both.bytes_per_token == text.bytes_per_token
    assert both.to_json()["num_tokens_with_bytes"] == text.num_tokens
