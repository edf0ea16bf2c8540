"""The folders under tokenizer/ are what their build files say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lmssl.tokenizer.build import load_build
from lmssl.tokenizer.encode import Encoder, adversarial_texts
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

SIZES = {
    "bpe-4k": 4096,
    "bpe-16k": 16384,
    "bpe-32k": 32768,
    "bpe-32k-masked": 32768,
    "wordpiece-8k": 8192,
    "wordpiece-30k": 30528,
    "unigram-8k": 8192,
    "t5-8k": 8192,
}
MODELS = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram"}


@pytest.fixture(params=SIZES)
def shipped(request: pytest.FixtureRequest, root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer" / request.param)


def test_nothing_else_is_shipped(root: Path) -> None:
    assert {folder.name for folder in (root / "tokenizer").iterdir() if folder.is_dir()} == set(SIZES)


def test_matches_its_build_file(shipped: Tokenizer) -> None:
    build = load_build(shipped.path / "build.yaml")
    assert build.name == shipped.path.name
    assert build.kind == MODELS[type(shipped.backend.model).__name__]
    assert shipped.num_tokens == SIZES[build.name] == build.vocab_size
    for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        text = build.control_tokens.get(role)
        assert getattr(shipped, f"{role}_id") == (None if text is None else shipped.backend.token_to_id(text))
    if build.kind == "bpe":
        expected = {"gpt2": "ByteLevel", "llama3": "Sequence", "qwen2": "Sequence"}[build.split or "gpt2"]
        assert type(shipped.backend.pre_tokenizer).__name__ == expected


def test_readme_is_about_this_folder(shipped: Tokenizer, root: Path) -> None:
    text = (shipped.path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {shipped.path.name}\n")
    assert f"{shipped.num_tokens:,} tokens" in text
    assert shipped.path.name in (root / "tokenizer" / "README.md").read_text(encoding="utf-8")


def test_adversarial_text(shipped: Tokenizer) -> None:
    texts = adversarial_texts(shipped)
    encoded = Encoder(shipped).encode(texts)
    added = shipped.backend.get_added_tokens_decoder().items()
    control = {i for i, token in added if token.special} - {shipped.unk_id}
    assert not control & set(encoded.ids.tolist())
    if shipped.unk_id is None:
        starts = [0, *encoded.ends.tolist()]
        decoded = [shipped.decode(encoded.ids[a:b].tolist()) for a, b in pairwise(starts)]
        assert decoded == texts


def test_autotokenizer_gives_the_same_ids(shipped: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(shipped.path)
    assert len(auto) == shipped.num_tokens
    names = {token.content for token in shipped.backend.get_added_tokens_decoder().values()}
    encoder = Encoder(shipped, "reference")
    for text in adversarial_texts(shipped):
        if not any(name in text for name in names):
            ids = encoder.encode([text]).ids.tolist()
            assert auto(text, add_special_tokens=False)["input_ids"] == ids
