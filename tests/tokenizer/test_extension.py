"""Tokenizers that know more tokens than another at the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from lmssl.errors import TokenizerError
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.extension import extend_tokenizer, new_tokens
from lmssl.tokenizer.load import load_tokenizer


def test_an_extension_keeps_every_id_and_adds_after_the_last(root: Path, tmp_path: Path) -> None:
    old = load_tokenizer(root / "tokenizer/bpe-4k")
    new = extend_tokenizer(old.path, tmp_path / "x", tokens=["zebrafish", "μmol"], special=["<|user|>"])
    before, after = (t.backend.get_vocab(with_added_tokens=True) for t in (old, new))
    assert all(after[text] == number for text, number in before.items())
    assert [after[t] for t in ("<|user|>", "zebrafish", "μmol")] == [old.num_tokens + k for k in range(3)]
    assert (new.num_tokens, new.eos_id, new.pad_id) == (old.num_tokens + 3, old.eos_id, old.pad_id)
    assert new.fingerprint != old.fingerprint
    stock = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert stock("a zebrafish")["input_ids"][-1] == after["zebrafish"]
    assert stock("<|user|>", add_special_tokens=False)["input_ids"] == [after["<|user|>"]]


def test_documents_are_encoded_with_new_tokens_and_without_control_tokens(root: Path, tmp_path: Path) -> None:
    new = extend_tokenizer(root / "tokenizer/bpe-4k", tmp_path / "x", tokens=["zebrafish"], special=["<|user|>"])
    vocabulary = new.backend.get_vocab(with_added_tokens=True)
    ids = Encoder(new, report=lambda _: None).encode(["<|user|> a zebrafish swims"]).ids.tolist()
    assert vocabulary["zebrafish"] in ids and vocabulary["<|user|>"] not in ids
    assert new.decode(ids) == "<|user|> a zebrafish swims"


def test_new_tokens_come_with_the_parts_of_their_text(root: Path, tmp_path: Path) -> None:
    old = load_tokenizer(root / "tokenizer/bpe-4k")
    new = extend_tokenizer(old.path, tmp_path / "x", tokens=["zebrafish"], special=["<|user|>"])
    user, fish = new_tokens(old, new)
    assert (user.text, user.parts) == ("<|user|>", ())
    assert len(fish.parts) > 1 and old.decode(fish.parts) == "zebrafish"
    assert new_tokens(old, old) == []


def test_words_of_wordpiece_lose_the_mark_of_continuation(root: Path, tmp_path: Path) -> None:
    old = load_tokenizer(root / "tokenizer/wordpiece-8k")
    content = json.loads((old.path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["##qqing"] = old.num_tokens
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (found,) = new_tokens(old, load_tokenizer(folder))
    assert found.parts == tuple(old.backend.encode("qqing", add_special_tokens=False).ids)


def test_another_tokenizer_is_refused_by_its_first_differing_token(root: Path, tmp_path: Path) -> None:
    old = load_tokenizer(root / "tokenizer/bpe-4k")
    with pytest.raises(TokenizerError, match="nor one that extends it: token '.*' is [0-9]+ for the model"):
        new_tokens(old, load_tokenizer(root / "tokenizer/bpe-16k"))
    longer = extend_tokenizer(old.path, tmp_path / "x", tokens=["zebrafish"])
    with pytest.raises(TokenizerError, match=f"'zebrafish' is {old.num_tokens} for the model and is not in it"):
        new_tokens(longer, old)


def test_ids_that_moved_are_named(tmp_path: Path) -> None:
    for name, words in {"a": ["x", "y", "z"], "b": ["x", "z", "y"]}.items():
        model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="x")
        (tmp_path / name).mkdir()
        tokenizers.Tokenizer(model).save(str(tmp_path / name / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="token 'y' is 1 for the model and is 2 in it"):
        new_tokens(load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "b"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "nothing to add"), (["the"], "has 'the' already"), (["qq", "qq"], "has 'qq' already"), ([" "], "no text")],
)
def test_what_cannot_be_added(root: Path, tmp_path: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        extend_tokenizer(root / "tokenizer/bpe-4k", tmp_path / "x", tokens=tokens)
    assert not (tmp_path / "x").exists()


def test_a_taken_folder_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(TokenizerError, match="not empty"):
        extend_tokenizer(root / "tokenizer/bpe-4k", tmp_path, tokens=["zebrafish"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
