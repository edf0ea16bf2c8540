"""What the files of a stock folder hold beyond what transformers 5 writes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_outputs import CausalLMOutput

from kinds import tiny
from lmssl.export.stock import write_stock
from lmssl.model.build import build_config, build_model
from lmssl.recipe.model import FAMILIES, OtherModel
from lmssl.tokenizer.load import load_tokenizer


@pytest.mark.parametrize("kind", ["t5", "umt5", "mt5"])
def test_version_4_scales_what_version_5_scales(kind: str, root: Path, tmp_path: Path) -> None:
    """Version 4 scales hidden states before a tied output matrix; version 5 does not for mT5, which is tied there."""
    model = tiny(kind, objective="span")
    write_stock(model, load_tokenizer(root / "tokenizer" / "t5-8k"), tmp_path, max_shard_size="5GB")
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is (kind != "mt5")
    assert ("lm_head.weight" in weights) is (kind == "mt5")
    again, said = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert again.lm_head.weight is again.shared.weight
    assert torch.equal(again.shared.weight, model.shared.weight)
    ids = torch.arange(8, 28)[None]
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for m in (again.eval(), model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def written(root: Path, folder: Path, kind: str, tokenizer_name: str, objective: str, **change: Any) -> Path:
    """A small model that was not trained, in a stock folder."""
    tokenizer = load_tokenizer(root / "tokenizer" / tokenizer_name)
    sentences = change.pop("sentences", False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **change}
    section = FAMILIES.get(kind, OtherModel).model_validate({"kind": kind, **sizes})
    config = build_config(
        section, objective=objective, vocab_size=tokenizer.num_tokens, sequence_length=64, tokenizer=tokenizer
    )
    model = build_model(config, objective=objective, seed=1, sentences=sentences)
    write_stock(model, tokenizer, folder, max_shard_size="5GB")
    return folder


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_pairs_can_be_classified_by_a_model_of_one_type_of_tokens(kind: str, root: Path, tmp_path: Path) -> None:
    folder = written(root, tmp_path, kind, "wordpiece-8k", "masked")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = tokenizer("a pair", "of texts", return_tensors="pt")
    assert ("token_type_ids" in pair) is (kind == "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model(**pair).logits.shape == (1, 2)


def test_a_model_that_was_asked_about_pairs_gets_types_from_any_tokenizer(root: Path, tmp_path: Path) -> None:
    folder = written(root, tmp_path, "bert", "bpe-32k-masked", "masked", sentences=True)
    pair = AutoTokenizer.from_pretrained(folder)("a pair", "of texts")
    types, ids = pair["token_type_ids"], pair["input_ids"]
    second = ids.index(AutoTokenizer.from_pretrained(folder).sep_token_id) + 1
    assert types == [0] * second + [1] * (len(ids) - second) and 1 in types


@pytest.mark.parametrize("name", ["bpe-32k-masked", "wordpiece-8k"])
def test_a_decoder_whose_texts_end_with_sep_goes_on_behind_a_prompt_and_stops_there(
    name: str, root: Path, tmp_path: Path
) -> None:
    folder = written(root, tmp_path, "llama", name, "hybrid")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ours = load_tokenizer(root / "tokenizer" / name)
    ids = tokenizer("The river")["input_ids"]
    assert ids == ours.backend.encode("The river").ids[:-1] and ids[0] == ours.cls_id
    pair = tokenizer("The river", "runs")["input_ids"]
    assert pair.count(ours.sep_id) == 1 and pair[-1] != ours.sep_id
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == ours.sep_id
    again = load_tokenizer(folder)
    assert again.eos_id == ours.sep_id and again.cls_id == ours.cls_id

    def always_sep(**_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.eye(model.config.vocab_size)[ours.sep_id][None, None])

    with mock.patch.object(model, "forward", always_sep):
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=9)
    assert found[0].tolist() == [*ids, ours.sep_id]
