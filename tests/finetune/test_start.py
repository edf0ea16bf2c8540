from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ModernBertConfig, ModernBertForMaskedLM

from lmssl.errors import ModelError
from lmssl.finetune.start import build_model, open_start


def test_the_body_is_the_exports_and_the_head_is_the_seeds(bert: Path) -> None:
    start = open_start(str(bert))
    one, same, other = (build_model(start, "classification", labels=("a", "b", "c"), seed=s) for s in (1, 1, 2))
    weights = load_file(bert / "model.safetensors")
    body = {name: value for name, value in one.state_dict().items() if name in weights}
    assert len(body) > 20
    assert all(value.equal(weights[name]) for name, value in body.items())
    assert one.classifier.weight.equal(same.classifier.weight)
    assert not one.classifier.weight.equal(other.classifier.weight)
    assert one.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_random_weights_are_the_seeds(bert: Path) -> None:
    start = open_start(str(bert), random_weights=True)
    one, same, other = (build_model(start, "tokens", labels=("a", "b"), seed=s) for s in (1, 1, 2))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert one.state_dict()[name].equal(same.state_dict()[name])
    assert not one.state_dict()[name].equal(other.state_dict()[name])
    assert not one.state_dict()[name].equal(load_file(bert / "model.safetensors")[name])


def test_a_masked_model_gives_no_answers(bert: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)BertForMaskedLM was not trained to continue text.*classification"):
        build_model(open_start(str(bert)), "instructions", labels=(), seed=0)


def test_a_family_without_the_class_is_refused(bert: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    ModernBertForMaskedLM(ModernBertConfig(vocab_size=8192, pad_token_id=0, **tokens, **sizes)).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bert / name, tmp_path / name)
    with pytest.raises(ModelError, match=r"(?s)no CausalLM model of the family modernbert.*classification or"):
        build_model(open_start(str(tmp_path)), "instructions", labels=(), seed=0)


def test_folders_that_hold_no_model(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)holds no model.*such as an export"):
        open_start(str(tmp_path))
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ModelError, match=r"lmssl export"):
        open_start(str(tmp_path))
    shutil.copytree(bert, tmp_path / "export")
    with pytest.raises(ModelError, match=r"did you mean .*export"):
        open_start(str(tmp_path))
    with pytest.raises(ModelError, match=r"did you mean .*export"):
        open_start(str(tmp_path / "exprt"))
    with pytest.raises(ModelError, match="cannot be read"):
        open_start("no-such/model")
    (tmp_path / "export/config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        open_start(str(tmp_path / "export"))


def test_missing_weights_are_not_drawn_in_silence(tmp_path: Path, bert: Path) -> None:
    shutil.copytree(bert, tmp_path / "x")
    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output" not in name}
    save_file(kept, tmp_path / "x/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights of the body are missing, such as bert\.encoder\.layer\.1"):
        build_model(open_start(str(tmp_path / "x")), "tokens", labels=("a", "b"), seed=0)
    (tmp_path / "x/model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(open_start(str(tmp_path / "x")), "tokens", labels=("a", "b"), seed=0)


def test_it_is_float32_whatever_the_export(tmp_path: Path, bert: Path) -> None:
    shutil.copytree(bert, tmp_path / "x")
    halves = {name: value.bfloat16() for name, value in load_file(bert / "model.safetensors").items()}
    save_file(halves, tmp_path / "x/model.safetensors", metadata={"format": "pt"})
    model = build_model(open_start(str(tmp_path / "x")), "tokens", labels=("a", "b"), seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
