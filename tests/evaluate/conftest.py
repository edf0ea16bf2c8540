"""Tiny models in transformers folders, each with a shipped tokenizer, built once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.utils.logging import disable_progress_bar

from lmssl.evaluate.questions import Result
from lmssl.evaluate.subject import open_subject
from lmssl.evaluate.suite import evaluate_suite, prepare_suite
from lmssl.recipe.suite import Suite

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "gpt_neox", "bert", "roberta", "modernbert"), WIDE),
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "albert": WIDE | {"embedding_size": 16},
    "electra": WIDE | {"embedding_size": 16},
    "t5": {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
}
TOKENIZERS = {
    **dict.fromkeys(("llama", "gpt_neox", "gpt2"), "bpe-4k"),
    **dict.fromkeys(("bert", "albert", "electra"), "wordpiece-8k"),
    **dict.fromkeys(("roberta", "modernbert"), "wordpiece-8k"),
    "t5": "t5-8k",
}
AUTO = {"bpe-4k": AutoModelForCausalLM, "wordpiece-8k": AutoModelForMaskedLM, "t5-8k": AutoModelForSeq2SeqLM}
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Folder:
    """The folder of a kind; `change` are fields of its config."""
    made: dict[str, Path] = {}

    def build(kind: str, **change: Any) -> Path:
        key = json.dumps([kind, change])
        if key in made:
            return made[key]
        disable_progress_bar()
        path = made[key] = tmp_path_factory.mktemp(kind)
        source = root / "tokenizer" / TOKENIZERS[kind]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, path / name)
        vocab = (
            max(json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"].values())
            if (kind != "t5")
            else 8191
        )
        given = {**SIZES[kind], "vocab_size": -(-(vocab + 1) // 64) * 64, "pad_token_id": 0, **change}
        if kind not in ("t5", "gpt2"):
            given.setdefault("max_position_embeddings", 64)
        torch.manual_seed(1)
        model = AUTO[TOKENIZERS[kind]].from_config(CONFIG_MAPPING[kind](**given))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(path)
        return path

    return build


@pytest.fixture(scope="session")
def one() -> Accelerator:
    """A single process on CPU."""
    return Accelerator(cpu=True)


@pytest.fixture
def ask(one: Accelerator) -> Callable[..., Result]:
    """The answer to one evaluation, given as YAML would give it."""

    def run(model: Path, batch_tokens: int = 2048, **evaluation: Any) -> Result:
        subject = open_subject(model)
        suite = Suite.model_validate({"evaluations": [{"name": "q", **evaluation}]})
        found = evaluate_suite(
            subject.model, prepare_suite(suite.evaluations, subject.reader), one, batch_tokens=batch_tokens
        )
        assert found is not None
        return found[0]

    return run
