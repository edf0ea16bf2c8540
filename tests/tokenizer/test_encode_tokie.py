"""The fast WordPiece engine agrees with the reference wherever it is used, and odd text does not reach it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lmssl.tokenizer.encode import Encoder, adversarial_texts
from lmssl.tokenizer.engines import TOKIE_ODD
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tokie") is None, reason="tokie is not installed")


@pytest.fixture(scope="module")
def wordpiece(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


def equal(tokenizer: Tokenizer, texts: list[str]) -> bool:
    lines: list[str] = []
    fast, reference = Encoder(tokenizer, report=lines.append), Encoder(tokenizer, "reference")
    ours, theirs = fast.encode(texts), reference.encode(texts)
    assert (fast.engine, lines) == ("tokie", [])
    assert (ours.ids.dtype, ours.ends.dtype) == (theirs.ids.dtype, theirs.ends.dtype)
    return np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.ends, theirs.ends)


@pytest.mark.parametrize("around", ["{}", "a{}b", "x {} y", "{}\u0301"])
def test_every_character_it_may_meet(wordpiece: Tokenizer, around: str) -> None:
    characters = (chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000)
    known = [character for character in characters if not TOKIE_ODD.search(character)]
    assert len(known) > 40_000
    # Not through `Encoder`, which would check a sample only and drop the engine at the first difference.
    engine, reference = Encoder(wordpiece)._fast, Encoder(wordpiece, "reference")
    raws = [around.format(character).encode() for character in known]
    assert engine is not None
    ours, theirs = engine.encode(raws), reference.encode_utf8(raws)
    wrong = np.flatnonzero(ours.ends != theirs.ends)
    assert not len(wrong), f"first at U+{ord(known[wrong[0]]):04X}"
    assert np.array_equal(ours.ids, theirs.ids)


def test_odd_texts_among_plain_ones(wordpiece: Tokenizer) -> None:
    assert equal(wordpiece, ["plain", "\x7fodd\u0378", "", "more", "\U0010ffff", "\ufdd0", "end"])
    assert equal(wordpiece, ["\x7f"])
    assert equal(wordpiece, adversarial_texts(wordpiece))
    assert equal(wordpiece, [])
