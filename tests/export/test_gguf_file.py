"""GGUF files hold the same numbers and tokens, in the layout that readers of the format expect."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gguf_models import KINDS, model_of, tokenizer_of
from lmssl.errors import ExportError
from lmssl.export.gguf_file import check_gguf, verify_gguf, write_gguf
from lmssl.export.weights import round_to
from lmssl.tokenizer.load import load_tokenizer

gguf = pytest.importorskip("gguf")


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


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("llama", {"hidden_act": "gelu"}, "runs llama with hidden_act: silu only"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function: gelu_new only"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: False only"),
        ("qwen3", {"attention_bias": True}, "attention_bias: False only"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "of type linear"),
    ],
)
def test_what_llama_cpp_has_built_in_otherwise(
    kind: str, changes: dict[str, object], found: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, kind, {k: v for k, v in KINDS[kind].items() if k != "rope_theta"} | changes)
    with pytest.raises(ExportError, match=found):
        check_gguf(model_of(kind, 4160), tokenizer_of(root, "bpe-4k"))


def test_a_tokenizer_that_adds_what_llama_cpp_cannot(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "tokenizer" / "bpe-4k", tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"SpecialToken": {"id": content["added_tokens"][0]["content"], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    specials = {content["added_tokens"][0]["content"]: {"id": token["SpecialToken"]["id"], "ids": [0], "tokens": ["x"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, token, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": specials,
    }
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="more around a text than bos and eos"):
        check_gguf(model_of("llama", 4160), load_tokenizer(tmp_path / "own"))
