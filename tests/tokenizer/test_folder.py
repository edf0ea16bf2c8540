from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmssl.errors import TokenizerError
from lmssl.tokenizer.build import load_build
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.folder import build_yaml
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.train import build_tokenizer

FILES = ["README.md", "build.yaml", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
PLAIN = ["Plain text, 12345 and it's fine.\n\n\tdef f(x):  return x", "Ünïcödé 日本語 👍🏽 \r\n a  b", ""]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_files(trained: Tokenizer) -> None:
    assert names(trained.path) == FILES
    config = json.loads((trained.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = json.loads((trained.path / "special_tokens_map.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    assert {key: value for key, value in config.items() if key.endswith("_token")} == special


def test_autotokenizer_gives_the_same_ids(trained: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(trained.path)
    assert len(auto) == trained.num_tokens
    encoded = Encoder(trained).encode(PLAIN)
    start = 0
    for text, end in zip(PLAIN, encoded.ends.tolist(), strict=True):
        assert auto(text, add_special_tokens=False)["input_ids"] == encoded.ids[start:end].tolist()
        start = end
    for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        assert getattr(auto, f"{role}_token_id") == getattr(trained, f"{role}_id")


def test_autotokenizer_surrounds_masked_texts_and_pairs(trained: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(trained.path)
    one, two = (auto(text, add_special_tokens=False)["input_ids"] for text in ("one", " two"))
    single, pair = auto("one"), auto("one", " two")
    if trained.mask_id is None:
        end = [trained.eos_id] if trained.path.name == "unigram-span" else []
        assert (single["input_ids"], pair["input_ids"]) == (one + end, one + end + two + end)
        assert set(single) == {"input_ids", "attention_mask"}
        return
    cls, sep = trained.cls_id, trained.sep_id
    assert single["input_ids"] == [cls, *one, sep]
    assert pair["input_ids"] == [cls, *one, sep, *two, sep]
    if "token_type_ids" in pair:
        assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)


def test_only_bert_like_tokenizers_give_token_types(folders: dict[str, Path]) -> None:
    given = {name for name, folder in folders.items() if "token_type_ids" in AutoTokenizer.from_pretrained(folder)("a")}
    assert given == {"wordpiece", "unigram"}


@pytest.mark.parametrize("name", ["bpe-masked", "wordpiece", "unigram"])
def test_mask_stands_for_a_word_with_its_space(folders: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(folders[name])
    auto = AutoTokenizer.from_pretrained(folders[name])
    word = auto("this is the.", add_special_tokens=False)["input_ids"]
    masked = auto(f"this is {auto.mask_token}.", add_special_tokens=False)["input_ids"]
    place = masked.index(tokenizer.mask_id)
    assert masked[:place] == word[:place]
    assert masked[place + 1 :] == word[-1:]


def test_sentinels_stand_for_words_with_their_space(folders: dict[str, Path]) -> None:
    auto = AutoTokenizer.from_pretrained(folders["unigram-span"])
    sentinels = auto.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    assert sentinels == list(range(3, 103))
    words, gap = (
        auto(text, add_special_tokens=False)["input_ids"] for text in ("this is the", "this <extra_id_7> the")
    )
    place = gap.index(sentinels[7])
    assert gap[:place] == words[:place]
    assert gap[place + 1 :] == words[-len(gap) + place + 1 :]
    readme = (folders["unigram-span"] / "README.md").read_text(encoding="utf-8")
    assert "sentinels `<extra_id_0>` to `<extra_id_99>`" in " ".join(readme.split())


def test_build_file_reads_back(trained: Tokenizer, make: Any) -> None:
    build = make(trained.path.name)
    assert load_build(trained.path / "build.yaml") == build


def test_long_and_odd_text_reads_back(make: Any, tmp_path: Path) -> None:
    for licence in ("word " * 60 + "end", "# one: two\n- three  " * 9, 'a "quoted": {x} ' * 9 + "é", "true"):
        build = make("wordpiece", licence=licence, mixture=[{"name": "t", "kind": "text", "path": ["a: b", "*"]}])
        (tmp_path / "build.yaml").write_text(build_yaml(build), encoding="utf-8")
        assert load_build(tmp_path / "build.yaml") == build


def test_readme_says_what_it_is(folders: dict[str, Path], texts: list[str]) -> None:
    text = " ".join((folders["bpe-llama3"] / "README.md").read_text(encoding="utf-8").split())
    num_bytes = sum(len(part.encode()) for part in texts)
    for part in ("# bpe-llama3", "llama3 split, 512 tokens", f"{len(texts)} documents", f"{num_bytes:,} bytes", "PSF"):
        assert part in text
    assert "`lmssl tokenizer tokenizer/bpe-llama3/build.yaml`" in text


def test_replaces_a_tokenizer(make: Any, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x"
    build_tokenizer(make("bpe-gpt2"), iter(texts), out)
    (out / "left-over").touch()
    build_tokenizer(make("bpe-masked"), iter(texts), out)
    assert load_tokenizer(out).mask_id is not None
    assert names(out) == FILES
    assert names(out.parent) == ["x"]


def test_replaces_an_empty_folder(make: Any, texts: list[str], tmp_path: Path) -> None:
    assert names(build_tokenizer(make("bpe-gpt2"), iter(texts), tmp_path)) == FILES


@pytest.mark.parametrize("is_file", [True, False])
def test_replaces_nothing_else(make: Any, tmp_path: Path, is_file: bool) -> None:
    out = tmp_path / "thesis"
    if is_file:
        out.write_text("words")
    else:
        out.mkdir()
        (out / "chapter").touch()
    with pytest.raises(TokenizerError, match="not a tokenizer folder"):
        build_tokenizer(make("bpe-gpt2"), iter(["never read"]), out)
    assert out.exists()


def test_interruption_leaves_the_old_folder(make: Any, texts: list[str], tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield texts[0]
        raise OSError("disk")

    out = build_tokenizer(make("bpe-gpt2"), iter(texts), tmp_path / "x")
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(OSError, match="disk"):
        build_tokenizer(make("bpe-masked"), failing(), out)
    assert (out / "tokenizer.json").read_bytes() == before
    assert names(tmp_path) == ["x"]
