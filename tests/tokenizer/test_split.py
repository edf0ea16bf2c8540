from __future__ import annotations

import json
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmssl.tokenizer.encode import plain_content
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.split import can_cut, cut_text


@given(st.text(alphabet="ab1_ \n.é\u0301日", max_size=200), st.integers(1, 20))
def test_pieces_join_to_the_text_and_begin_at_a_space(text: str, size: int) -> None:
    raw = text.encode()
    pieces = list(cut_text(raw, size))
    assert b"".join(pieces) == raw
    for left, right in pairwise(pieces):
        assert len(left) >= size and left.decode()[-1].isalnum() and right.startswith(b" ")
    # Only the last piece may have gone past a place to cut.
    for piece in pieces:
        places = (i for i in range(size, len(piece)) if piece[i : i + 1] == b" ")
        assert not any(piece[:place].decode(errors="ignore")[-1].isalnum() for place in places)


def test_a_text_without_a_safe_place_stays_whole() -> None:
    assert [*cut_text(b"x" * 100, 10)] == [b"x" * 100]
    assert [*cut_text(b"a\n" * 100, 10)] == [b"a\n" * 100]
    assert [*cut_text(b"", 10)] == [b""]


def test_normal_forms_keep_the_character_before_a_cut_a_letter_or_number() -> None:
    # The proof that a cut stays a cut under NFC and NFKC needs this of every character.
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        if character.isalnum():
            assert unicodedata.category(character)[0] in "LN"
            assert not unicodedata.normalize("NFC", character)[-1].isspace()
            assert not unicodedata.normalize("NFKC", character)[-1].isspace()


def test_all_that_we_train_can_be_cut(trained: Tokenizer) -> None:
    assert can_cut(json.loads(trained.backend.to_str()))


@pytest.fixture(scope="module")
def backends(folders: dict[str, Path]) -> list[tokenizers.Tokenizer]:
    contents = [plain_content(load_tokenizer(folder)) for folder in folders.values()]
    return [tokenizers.Tokenizer.from_str(json.dumps(content)) for content in contents]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=" \n\r\t'.!_-1a9ZsS\u0301éß日👍🏽\u00a0\u3000\u0085\x1c٣½", min_size=2, max_size=60))
def test_cut_text_gives_the_same_ids(backends: list[tokenizers.Tokenizer], text: str) -> None:
    for backend in backends:
        pieces = [piece.decode() for piece in cut_text(text.encode(), 1)]
        parts = backend.encode_batch_fast(pieces, add_special_tokens=False)
        assert [i for part in parts for i in part.ids] == backend.encode(text, add_special_tokens=False).ids


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "content",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}},
        {"pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Prepend", "prepend": "_"}},
        {
            "pre_tokenizer": BYTE_LEVEL,
            "normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"},
        },
        {"pre_tokenizer": BYTE_LEVEL, "added_tokens": [{"content": "a b", "special": False}]},
    ],
)
def test_anything_else_is_not_cut(content: dict[str, Any]) -> None:
    assert not can_cut(content)


def test_normalizers_in_sequence() -> None:
    parts = [{"type": "NFC"}, {"type": "Lowercase"}]
    assert can_cut({"pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Sequence", "normalizers": parts}})
    parts.append({"type": "Strip"})
    assert not can_cut({"pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Sequence", "normalizers": parts}})
