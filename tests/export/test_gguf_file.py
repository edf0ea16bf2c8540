"""GGUF files hold the same numbers and tokens, in the layout that readers of the format expect."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmssl.errors import ExportError
from lmssl.export.gguf_file import check_gguf, verify_gguf, write_gguf
from lmssl.export.weights import round_to
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def tokenizer_of(root: Path, name: str) -> Tokenizer:
    return load_tokenizer(root / "tokenizer" / name)


def model_of(kind: str, num_rows: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=num_rows, bos_token_id=0, eos_token_id=0, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # none at its initial value, or a swapped norm would not show
            weight.add_(0.05 * torch.randn(weight.shape))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits(kind: str, root: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(root, "bpe-4k")
    model = model_of(kind, 4160)
    split = check_gguf(model, tokenizer)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", name="m", split=split)
    assert verify_gguf(model, tokenizer, tmp_path / "m.gguf") < 1e-5
    with torch.no_grad():
        model.get_input_embeddings().weight[5:].mul_(1.01)
    with pytest.raises(ExportError, match="gives other logits"):
        verify_gguf(model, tokenizer, tmp_path / "m.gguf")


def test_the_same_tokens(root: Path, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_of(root, "bpe-16k"), model_of("llama", 16448)
    split = check_gguf(model, tokenizer)
    round_to(model, "bfloat16")
    write_gguf(model, tokenizer, tmp_path / "m.gguf", name="m", split=split)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    content = json.loads((tokenizer.path / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: tokenizer.num_tokens] == [tokenizer.backend.id_to_token(k) for k in range(tokenizer.num_tokens)]
    assert tokens[-1] == "[UNUSED16447]"
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(m) for m in content["model"]["merges"]]
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[tokenizer.eos_id], kinds[300], kinds[-1]) == (3, 1, 5)
    assert fields["general.file_type"].contents() == 32
    round_to(model, "float32")
    assert verify_gguf(model, tokenizer, tmp_path / "m.gguf") < 1e-5


def test_a_split_of_ones_own(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "tokenizer" / "bpe-4k", tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="does not know how this tokenizer splits"):
        check_gguf(model_of("llama", 4160), load_tokenizer(tmp_path / "own"))


def test_a_token_that_no_merge_makes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "tokenizer" / "bpe-16k", tmp_path / "odd")
    path = tmp_path / "odd" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="never made by merging"):
        check_gguf(model_of("llama", 16448), load_tokenizer(tmp_path / "odd"))


def test_what_is_refused_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = AutoConfig.for_model(
        "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    with pytest.raises(ExportError, match="a bert model is not written as GGUF"):
        check_gguf(AutoModelForCausalLM.from_config(bert), tokenizer_of(root, "bpe-4k"))
    with pytest.raises(ExportError, match="does not know how"):
        check_gguf(model_of("llama", 8192), tokenizer_of(root, "wordpiece-8k"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="takes the package gguf"):
        check_gguf(model_of("llama", 4160), tokenizer_of(root, "bpe-4k"))
