"""Small tokenizers of every kind, trained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.train import TokenizerBuild, build_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "bpe-gpt2": {"kind": "bpe", "objective": "causal"},
    "bpe-llama3": {"kind": "bpe", "objective": "causal", "split": "llama3"},
    "bpe-qwen2": {"kind": "bpe", "objective": "causal", "split": "qwen2"},
    "bpe-masked": {"kind": "bpe", "objective": "masked"},
    "wordpiece": {"kind": "wordpiece", "objective": "masked"},
    "wordpiece-lower": {"kind": "wordpiece", "objective": "causal", "lowercase": True, "strip_accents": True},
    "unigram": {"kind": "unigram", "objective": "masked"},
    "unigram-span": {"kind": "unigram", "objective": "span"},
}
BPE = [name for name in KINDS if name.startswith("bpe")]
CORPUS = {"name": "docs", "kind": "python_docs"}

Make = Callable[..., TokenizerBuild]


def build_of(name: str, **changes: Any) -> TokenizerBuild:
    values = {"name": name, "licence": "PSF", "vocab_size": 500, "mixture": [CORPUS], **KINDS[name], **changes}
    return TokenizerBuild.model_validate(values)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 100 kB of the language reference, with some other scripts."""
    return [*(topics[name] for name in sorted(topics)[:20]), "Ünïcödé 日本語 русский 👍🏽 naïve café"]


@pytest.fixture(scope="session")
def make() -> Make:
    """`make(name, **changes)`: the build of a small tokenizer."""
    return build_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """One trained folder for each of `KINDS`."""
    root = tmp_path_factory.mktemp("tokenizer")
    return {name: build_tokenizer(build_of(name), iter(texts), root / name) for name in KINDS}


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """Each small tokenizer in turn."""
    return load_tokenizer(folders[request.param])


@pytest.fixture(params=BPE)
def byte_level(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """Each byte-level one in turn."""
    return load_tokenizer(folders[request.param])
