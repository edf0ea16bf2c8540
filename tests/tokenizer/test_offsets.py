from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from lmssl.tokenizer.encode import Encoder, adversarial_texts
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import TokenOffsets
from lmssl.tokenizer.split import PIECE_BYTES

FOLDERS = ("bpe-4k", "wordpiece-8k", "unigram-8k")
PROSE = "The naïve café’s Ångström — 日本語 and 👨‍👩‍👧 e\u0301clair, don't  stop;\n\n  ﬁne Straße\t1½ tokens. " * 3


@pytest.fixture(scope="module", params=FOLDERS)
def shipped(request: pytest.FixtureRequest, root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer" / request.param)


def test_ids_are_those_of_the_encoder_and_bounds_tile_the_text(shipped: Tokenizer) -> None:
    texts = [*adversarial_texts(shipped), PROSE]
    expected = Encoder(shipped, "reference", report=lambda _: None).encode(texts)
    offsets, begin = TokenOffsets(shipped), 0
    for text, end in zip(texts, expected.ends.tolist(), strict=True):
        found = offsets.encode(text)
        assert found.ids.tolist() == expected.ids[begin:end].tolist()
        bounds = found.bounds.tolist()
        assert len(bounds) == len(found.ids) + 1 and bounds == sorted(bounds)
        assert bounds[-1] == len(text.encode()) and (not found.ids.size or bounds[0] == 0)
        begin = end


def test_byte_level_tokens_give_back_their_bytes_exactly(root: Path) -> None:
    tokenizer = load_tokenizer(root / "tokenizer/bpe-4k")
    offsets = TokenOffsets(tokenizer)
    inside = 0
    for text in [PROSE, *(text[:60] for text in adversarial_texts(tokenizer) if "<|" not in text)]:
        raw, found = text.encode(), offsets.encode(text)
        bounds = found.bounds.tolist()
        inside += sum(raw[at] & 0xC0 == 0x80 for at in bounds[1:-1])
        for i, j in combinations(range(min(len(bounds), 60)), 2):
            assert tokenizer.decode(found.ids[i:j]) == raw[bounds[i] : bounds[j]].decode(errors="replace")
    assert inside > 50  # tokens that share a character with the one before


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_whole_words_encode_to_the_same_ids_again(root: Path, folder: str) -> None:
    tokenizer = load_tokenizer(root / "tokenizer" / folder)
    offsets, raw = TokenOffsets(tokenizer), PROSE.encode()
    found = offsets.encode(PROSE)
    tokens = [tokenizer.backend.id_to_token(token) for token in found.ids.tolist()]
    marks = [not token.startswith("##") if folder == FOLDERS[1] else token.startswith("▁") for token in tokens]
    starts = [i for i, is_start in enumerate(marks) if is_start]
    assert len(starts) > 30
    for i, j in combinations(starts, 2):
        words = raw[found.bounds[i] : found.bounds[j]].decode()
        assert offsets.encode(words).ids.tolist() == found.ids[i:j].tolist(), words


def test_a_long_text_is_measured_in_its_pieces(shipped: Tokenizer) -> None:
    text = "é one two " * (PIECE_BYTES // 4)
    found = TokenOffsets(shipped).encode(text)
    expected = Encoder(shipped, "reference").encode([text]).ids
    assert found.ids.tolist() == expected.tolist()
    assert found.bounds[-1] == len(text.encode())
    middle = len(found.ids) // 2
    back = shipped.decode(found.ids[middle : middle + 40]).replace("##", "")
    raw = text.encode()[found.bounds[middle] : found.bounds[middle + 40]].decode()
    flat = raw.replace("é", "e") if "wordpiece" in str(shipped.path) else raw
    assert "".join(back.split()) == "".join(flat.split())


def test_byte_level_after_a_normaliser_falls_back_to_characters(root: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(root / "tokenizer/bpe-4k/tokenizer.json"))
    backend.normalizer = normalizers.NFC()
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "e\u0301clair and caf\u00e9, e\u0301"
    found = TokenOffsets(load_tokenizer(tmp_path)).encode(text)
    assert found.bounds[0] == 0 and found.bounds[-1] == len(text.encode())
    for at in found.bounds.tolist():
        text.encode()[:at].decode()  # no bound lies inside a character


def test_a_space_put_before_the_text_takes_no_bytes(root: Path, tmp_path: Path) -> None:
    content = json.loads((root / "tokenizer/bpe-4k/tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = TokenOffsets(load_tokenizer(tmp_path)).encode("the end")
    assert found.bounds.tolist()[0] == 0 and found.bounds.tolist()[-1] == 7
