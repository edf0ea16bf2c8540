"""A tiny tokenizer, corpora on disk, and streams over them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import Unit, list_units
from lmssl.data.ledger import Ledger
from lmssl.data.stream import SequenceStream
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import DataSection, JsonlCorpus
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

WORDS = [
    "the",
    "a",
    "of",
    "stone",
    "river",
    "light",
    "grew",
    "under",
    "slow",
    "moon",
    "and",
    "then",
    "never",
    "again",
    "winter",
    "house",
    "song",
    "old",
    "green",
    "deep",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE of about 300 tokens with bos, eos and pad."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    config |= {"cls_token": "<bos>", "sep_token": "<eos>"}  # two names of the same tokens, as RoBERTa's have
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """`texts(count, seed)`: distinct documents of very different lengths."""

    def build(count: int, seed: int = 0) -> list[str]:
        draw = random.Random(seed)
        lengths = [max(1, int(draw.lognormvariate(3, 1))) for _ in range(count)]
        return [f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=length)) for i, length in enumerate(lengths)]

    return build


@pytest.fixture
def jsonl(tmp_path: Path, texts: Callable[..., list[str]]) -> Callable[..., JsonlCorpus]:
    """`jsonl(name, count)`: a corpus of `count` documents in one file."""

    def build(name: str = "tales", count: int = 400, seed: int = 0, **fields: Any) -> JsonlCorpus:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count, seed)), encoding="utf-8")
        return JsonlCorpus(name=name, kind="jsonl", path=str(path), **fields)

    return build


@pytest.fixture
def open_stream(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., SequenceStream]:
    """`open_stream(*corpora, **settings)`: small sequences, chunks, windows and blocks."""

    def build(
        *corpora: Any,
        seed: int = 7,
        cache: str = "cache",
        ledger: Ledger | None = None,
        report: Any = None,
        batches: BatchPlan | None = None,
        read_positions: int | None = None,
        seps_per_segment: int = 1,
        **fields: Any,
    ) -> SequenceStream:
        small = {"sequence_length": 64, "chunk_bytes": 4096, "window_chunks": 4, "block_sequences": 16}
        section = DataSection(mixture=corpora, **{"validation": {"ratio": 0.1, "tokens": 2000}, **small, **fields})
        run = {"batches": batches, "read_positions": read_positions}
        run["seps_per_segment"] = seps_per_segment
        return SequenceStream.open(section, tokenizer, seed, tmp_path / cache, ledger, report, **run)

    return build


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def open_cache(tmp_path: Path, tokenizer: Tokenizer, lines: list[str]) -> Callable[..., ChunkCache]:
    def build(root: Path | None = None, cancelled: Callable[[], bool] = lambda: False) -> ChunkCache:
        root = root or tmp_path / "cache"
        return ChunkCache(root, tokenizer, max_bad_records=5, report=lines.append, cancelled=cancelled)

    return build


@pytest.fixture
def unit(jsonl: Any) -> Unit:
    (unit,) = list_units(jsonl(count=50))
    return unit
