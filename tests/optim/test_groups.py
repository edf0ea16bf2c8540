"""Roles of parameters, groups by role, fused AdamW over them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, LlamaConfig, T5Config

from lmssl.optim.groups import build_optimizer, parameter_groups, parameter_roles, set_rates
from lmssl.recipe.optim import AdamW, Muon

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
ADAMW = AdamW(kind="adamw", lr=0.01)


def of_role(model: nn.Module, role: str) -> list[str]:
    return [name for name, found in parameter_roles(model).items() if found == role]


def test_tied_weights_are_an_embedding_and_count_once() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    assert of_role(model, "embedding") == ["model.embed_tokens.weight"]
    assert of_role(model, "head") == []
    assert of_role(model, "vector") == [name for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(of_role(model, "matrix")) == 7


def test_an_output_matrix_of_its_own_is_the_head() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False}))
    assert of_role(model, "head") == ["lm_head.weight"]


def test_learned_positions_and_position_biases_are_embeddings() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert of_role(gpt2, "embedding") == ["transformer.wte.weight", "transformer.wpe.weight"]
    t5 = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2))
    assert sum("relative_attention_bias" in name for name in of_role(t5, "embedding")) == 2


def test_frozen_weights_are_in_no_group() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.model.embed_tokens.weight.requires_grad_(False)
    assert of_role(model, "embedding") == []
    assert sum(len(g["params"]) for g in parameter_groups(model, ADAMW)) == len(list(model.parameters())) - 1


def test_every_role_has_its_rate_and_decay() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False}))
    section = AdamW(kind="adamw", lr=0.01, embedding_lr=0.02, head_lr=0.03, weight_decay=0.3)
    found = {group["role"]: (group["peak_lr"], group["weight_decay"]) for group in parameter_groups(model, section)}
    assert found == {"embedding": (0.02, 0.3), "matrix": (0.01, 0.3), "head": (0.03, 0.3), "vector": (0.01, 0.0)}
    muon = Muon(kind="muon", lr=0.01, adamw_lr=0.002, head_lr=0.03)
    rates = {g["role"]: (g["optimizer"], g["peak_lr"], g["weight_decay"]) for g in parameter_groups(model, muon)}
    assert rates["matrix"] == ("muon", 0.01, 0.1)
    assert rates["embedding"] == ("adamw", 0.002, 0.1)
    assert rates["head"] == ("adamw", 0.03, 0.1)
    assert rates["vector"] == ("adamw", 0.002, 0.0)


def test_the_order_of_parameters_is_that_of_earlier_versions() -> None:
    # The gradient norm is summed in this order: all that decays, as the model has it, then all that does not.
    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2))
    named = list(model.named_parameters())
    expected = [name for name, p in named if p.ndim >= 2] + [name for name, p in named if p.ndim < 2]
    assert [name for group in parameter_groups(model, ADAMW) for name in group["names"]] == expected


def test_optimizer_takes_every_value_of_the_section() -> None:
    section = AdamW(kind="adamw", lr=0.01, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(AutoModelForCausalLM.from_config(CONFIG), section)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-6)
        assert group["weight_decay"] == (0.0 if group["role"] == "vector" else 0.3)
        assert group["fused"]


def test_set_rates_multiplies_each_peak() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    optimizer = build_optimizer(model, Muon(kind="muon", lr=0.02, adamw_lr=0.004))
    set_rates(optimizer.param_groups, ratio=0.5, momentum=0.9)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.01 if group["role"] == "matrix" else 0.002)
        assert group.get("momentum") == (0.9 if group["role"] == "matrix" else None)


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        build_optimizer(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16), ADAMW)
