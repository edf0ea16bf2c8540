"""Configs and initial weights from a recipe's model section."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmssl.errors import ModelError
from lmssl.model.build import build_config, build_model
from lmssl.recipe.model import Gpt2Model, LlamaModel, OtherModel, Qwen3Model

LLAMA: dict[str, Any] = {
    "kind": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class FakeTokenizer:
    num_tokens, bos_id, eos_id, pad_id = 300, None, 7, 8


def config(section: Any, **change: Any) -> Any:
    return build_config(section, **{"vocab_size": 320, "sequence_length": 64, "tokenizer": FakeTokenizer(), **change})


def test_llama_takes_vocabulary_positions_and_special_ids() -> None:
    got = config(LlamaModel(**LLAMA, rope_theta=5e5))
    assert (got.vocab_size, got.max_position_embeddings, got.eos_token_id, got.pad_token_id) == (320, 64, 7, 8)
    assert got.bos_token_id is None
    assert got.rope_parameters["rope_theta"] == 5e5
    assert got.num_key_value_heads == 4
    assert got.head_dim == 8


def test_qwen3_head_dim_follows_the_width_and_not_transformers_default() -> None:
    assert config(Qwen3Model(**{**LLAMA, "kind": "qwen3"})).head_dim == 8


def test_gpt2_has_no_dropout_by_default() -> None:
    got = config(Gpt2Model(kind="gpt2", n_embd=32, n_layer=2, n_head=4))
    assert (got.resid_pdrop, got.embd_pdrop, got.attn_pdrop, got.n_positions) == (0.0, 0.0, 0.0, 64)


def test_tokenizer_larger_than_the_vocabulary() -> None:
    with pytest.raises(ModelError, match="300 tokens.*only 256"):
        config(LlamaModel(**LLAMA, vocab_size=256))


def test_sequence_longer_than_the_positions() -> None:
    with pytest.raises(ModelError, match="64 tokens do not fit the model's 32 positions"):
        config(LlamaModel(**LLAMA, max_position_embeddings=32))


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'mistral'"):
        config(OtherModel(**{**LLAMA, "kind": "mistrall"}))


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'hidden_size'"):
        config(OtherModel(**{**LLAMA, "kind": "mistral", "hiden_size": 3}))


def test_sizes_left_out_are_refused() -> None:
    with pytest.raises(ModelError, match="needs intermediate_size"):
        config(OtherModel(**{k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"kind": "mistral"}))


def test_another_stock_family_trains_through_our_head() -> None:
    section = OtherModel(**{**LLAMA, "kind": "mistral", "sliding_window": None})
    assert type(build_model(config(section), seed=1)).__name__ == "MistralForCausalLM"


def test_a_family_that_scales_its_logits_is_refused() -> None:
    section = OtherModel(**{**LLAMA, "kind": "granite", "logits_scaling": 8.0})
    with pytest.raises(ModelError, match="otherwise"):
        build_model(config(section), seed=1)


def test_weights_depend_on_the_seed_alone() -> None:
    cfg = config(LlamaModel(**LLAMA))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(cfg, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second, other = build_model(cfg, seed=3), build_model(cfg, seed=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_meta_models_take_no_memory() -> None:
    model = build_model(config(LlamaModel(**LLAMA)), seed=1, device="meta")
    assert all(p.is_meta for p in model.parameters())
