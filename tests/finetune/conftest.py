"""Tiny models as an export writes them, and rows to fine-tune them on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ONES, ZEROS = ("if", "while", "class", "for"), ("red", "blue", "green", "for")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence, as `finetune` asks for; its level is put back."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)


def _export(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 64}))
    return folder


@pytest.fixture(scope="session")
def bert(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked model of random weights."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=8192, **SIZES))
    return _export(model, root / "tokenizer/wordpiece-8k", tmp_path_factory.mktemp("exports") / "bert")


@pytest.fixture(scope="session")
def llama(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **SIZES))
    return _export(model, root / "tokenizer/bpe-4k", tmp_path_factory.mktemp("exports") / "llama")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], Path]:
    """Writes rows as JSON lines."""

    def written(name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return written


@pytest.fixture
def labelled() -> list[dict[str, Any]]:
    """Texts of programming words (1) or colours (0)."""
    draw = random.Random(0)
    texts = [(" ".join(draw.choices(ONES if n % 2 else ZEROS, k=8)), n % 2) for n in range(96)]
    return [{"text": text, "label": label} for text, label in texts]


@pytest.fixture
def tagged() -> list[dict[str, Any]]:
    """Words and whether they are colours."""
    draw = random.Random(1)
    rows = [draw.choices((*ONES[:3], *ZEROS[:3]), k=6) for _ in range(96)]
    return [{"words": words, "tags": ["COLOUR" if word in ZEROS else "CODE" for word in words]} for words in rows]
