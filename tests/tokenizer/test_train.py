from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.train import build_tokenizer, load_build, train_tokenizer


def special(tokenizer: Tokenizer) -> list[str]:
    added = tokenizer.backend.get_added_tokens_decoder()
    return [token.content for _, token in sorted(added.items()) if token.special]


def test_size_is_a_multiple_filled_with_reserved_tokens(trained: Tokenizer) -> None:
    assert trained.num_tokens == 512
    reserved = [text for text in special(trained) if "reserved" in text]
    assert len(reserved) == 512 - 500
    assert {trained.backend.token_to_id(text) for text in reserved} == set(range(500, 512))


def test_control_tokens_come_first(folders: dict[str, Path]) -> None:
    masked = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for name in ("bpe-masked", "wordpiece", "unigram"):
        assert special(load_tokenizer(folders[name]))[:5] == masked
    assert special(load_tokenizer(folders["bpe-gpt2"]))[:2] == ["<|endoftext|>", "<|pad|>"]
    assert special(load_tokenizer(folders["wordpiece-lower"]))[:3] == ["<|endoftext|>", "<|pad|>", "<|unk|>"]


@pytest.mark.parametrize("name", ["bpe-gpt2", "wordpiece", "unigram"])
def test_extra_special_tokens_are_control_tokens(make: Any, texts: list[str], tmp_path: Path, name: str) -> None:
    extra = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    build = make(name, extra_special_tokens=extra)
    tokenizer = load_tokenizer(build_tokenizer(build, iter(texts), tmp_path / name))
    count = len(set(build.control_tokens.values()))
    assert special(tokenizer)[count : count + 3] == extra
    assert [tokenizer.backend.token_to_id(text) for text in extra] == [count, count + 1, count + 2]
    assert tokenizer.num_tokens == 512
    assert load_build(tmp_path / name / "build.yaml") == build
    assert all(f"`{text}`" in (tmp_path / name / "README.md").read_text() for text in extra)
    # Text that looks like one stays text.
    ids = Encoder(tokenizer, engine="reference").encode(["a <|fim_prefix|> b"]).ids.tolist()
    assert not {count, count + 1, count + 2} & {*ids}


def test_causal_ids(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["bpe-gpt2"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 0, 1, None)


def test_bytes_never_seen_have_a_token(byte_level: Tokenizer) -> None:
    vocabulary = byte_level.backend.get_vocab()
    assert all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())


def test_splits_differ(folders: dict[str, Path]) -> None:
    def pieces(name: str) -> list[str]:
        backend = load_tokenizer(folders[name]).backend
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("12345 I'LL")]

    assert pieces("bpe-gpt2") == ["12345", "ĠI", "'", "LL"]
    assert pieces("bpe-llama3") == ["123", "45", "ĠI", "'LL"]
    assert pieces("bpe-qwen2") == ["1", "2", "3", "4", "5", "ĠI", "'LL"]


def test_wordpiece_normalization(folders: dict[str, Path]) -> None:
    normalize = load_tokenizer(folders["wordpiece-lower"]).backend.normalizer.normalize_str
    keep = load_tokenizer(folders["wordpiece"]).backend.normalizer.normalize_str
    assert (normalize("Café"), keep("Café")) == ("cafe", "Café")


def test_every_wordpiece_character_can_be_spelled(folders: dict[str, Path], texts: list[str]) -> None:
    tokenizer = load_tokenizer(folders["wordpiece"])
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    assert not any(tokenizer.unk_id in encoding.ids for encoding in encodings)


CODE = """
import hashlib, sys
from pathlib import Path
from lmssl.tokenizer.train import load_build, train_tokenizer
texts = Path(sys.argv[2]).read_text(encoding="utf-8").split("\\0")
print(hashlib.sha256(train_tokenizer(load_build(sys.argv[1]), iter(texts)).to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("name", ["bpe-gpt2", "wordpiece", "unigram"])
def test_the_same_text_gives_the_same_bytes(
    folders: dict[str, Path], texts: list[str], tmp_path: Path, name: str
) -> None:
    # Fresh processes, because a hash map's order is drawn once for each; with threads, because sums then change order.
    file = tmp_path / "text"
    file.write_text("\0".join(texts), encoding="utf-8")
    command = [sys.executable, "-c", CODE, str(folders[name] / "build.yaml"), str(file)]
    hashes = set()
    for parallel in ("true", "false"):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        hashes.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(hashes) == 1


def test_unigram_scores_are_sorted_and_rounded(folders: dict[str, Path]) -> None:
    model = json.loads((folders["unigram"] / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    scores = [score for _, score in model["vocab"][5:]]
    assert scores == sorted(scores, reverse=True)
    assert all(round(score, 3) == score for score in scores)
    assert model["vocab"][model["unk_id"]][0] == "[UNK]"


@pytest.mark.parametrize("name", ["bpe-gpt2", "wordpiece", "unigram"])
def test_too_little_text(make: Any, name: str) -> None:
    with pytest.raises(TokenizerError, match=r"gives only \d+ tokens, and vocab_size is 20000") as caught:
        train_tokenizer(make(name, vocab_size=20_000), iter(["a few words and no more, a few words"]))
    assert caught.value.remedy is not None and "set vocab_size to" in caught.value.remedy


@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_too_many_characters(make: Any, name: str) -> None:
    text = " ".join(chr(0x4E00 + i) * 3 for i in range(200))
    with pytest.raises(TokenizerError, match=r"characters of the text alone take .* vocab_size.*100"):
        train_tokenizer(make(name, vocab_size=100), iter([text]))


def test_limits_cut_documents_and_the_sample(make: Any) -> None:
    read: list[int] = []

    def watched() -> Any:
        for i, text in enumerate(["é" * 100 + "zq" * 100, "hello there " * 20, "zq" * 100]):
            read.append(i)
            yield text

    build = make("bpe-gpt2", vocab_size=262, max_document_bytes=101, sample_bytes=202)
    vocabulary = train_tokenizer(build, watched()).get_vocab()
    assert read == [0, 1]
    assert "zq" not in vocabulary
    assert "Ã©" in vocabulary


def test_lone_surrogates_do_not_stop_the_training(make: Any, texts: list[str]) -> None:
    trained = train_tokenizer(make("bpe-gpt2"), iter([*texts, "bad \ud800"]))
    # A surrogate counts as a question mark; all other text gives the tokens that it gives without the bad document.
    assert trained.to_str() == train_tokenizer(make("bpe-gpt2"), iter([*texts, "bad ?"])).to_str()
    assert trained.decode(trained.encode(texts[0]).ids) == texts[0]


@pytest.mark.parametrize("name", ["bpe-gpt2", "wordpiece", "unigram"])
def test_an_error_of_the_source_arrives_unchanged(make: Any, name: str) -> None:
    def failing() -> Any:
        yield "some text"
        raise TokenizerError("the source broke", remedy="none")

    with pytest.raises(TokenizerError, match="the source broke"):
        train_tokenizer(make(name), failing())
