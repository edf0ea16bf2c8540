from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import RecipeError
from lmssl.tokenizer.build import load_build

TEXT = """\
name: small
licence: public domain
kind: bpe
objective: causal
vocab_size: 1_000
mixture:
  - {name: novels, kind: text, path: "novels/*.txt"}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_defaults(file: Path) -> None:
    build = load_build(file)
    assert (build.split, build.pad_to_multiple, build.sample_bytes, build.max_document_bytes) == (
        None,
        64,
        1 << 30,
        100_000,
    )


def test_overrides(file: Path) -> None:
    assert load_build(str(file), ["vocab_size=2000", "split=qwen2"]).split == "qwen2"


@pytest.mark.parametrize(
    ("kind", "objective", "roles"),
    [
        ("bpe", "causal", {"bos", "eos", "pad"}),
        ("unigram", "causal", {"bos", "eos", "pad", "unk"}),
        ("wordpiece", "causal", {"bos", "eos", "pad", "unk"}),
        ("bpe", "masked", {"pad", "unk", "cls", "sep", "mask"}),
        ("unigram", "span", {"pad", "eos", "unk"}),
    ],
)
def test_control_tokens(file: Path, kind: str, objective: str, roles: set[str]) -> None:
    assert set(load_build(file, [f"kind={kind}", f"objective={objective}"]).control_tokens) == roles


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=unknown", "kind"),
        ("vocab_size=ten", "vocab_size"),
        ("vocab_size=258", "leaves no merges"),
        ("split=gpt4", "split"),
        ("lowercase=true", "lowercase"),
        ("strip_accents=true", "strip_accents"),
        ("sample_bytes=1e12", "sample_bytes"),
        ("mixture=[]", "mixture"),
        ("vocabulary=5", "vocabulary"),
        ("licence=''", "licence"),
        ("extra_special_tokens=['']", "extra_special_tokens"),
        ("extra_special_tokens=['<|pad|>']", "'<|pad|>' is a control token already"),
        ("extra_special_tokens=['<a>','<a>']", "'<a>' is a control token already"),
    ],
)
def test_wrong_values_are_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_build(file, [override])


def test_extra_special_tokens_take_room(file: Path) -> None:
    with pytest.raises(RecipeError, match="control tokens alone take 260"):
        load_build(file, ["extra_special_tokens=['<a>','<b>']", "vocab_size=260"])


def test_split_is_for_bpe(file: Path) -> None:
    overrides: list[Any] = ["kind=wordpiece", "split=gpt2"]
    with pytest.raises(RecipeError, match="split"):
        load_build(file, overrides)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such"):
        load_build(tmp_path / "absent.yaml")
