"""Parameter groups by role, fused AdamW over them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lmssl.optim.groups import build_optimizer, parameter_groups
from lmssl.recipe.sections import AdamW

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


def test_norms_do_not_decay_and_tied_weights_count_once() -> None:
    groups = parameter_groups(AutoModelForCausalLM.from_config(CONFIG))
    assert all(name.endswith("norm.weight") for name in groups["no_decay"])
    assert len(groups["no_decay"]) == 3
    assert "model.embed_tokens.weight" in groups["decay"]
    assert "lm_head.weight" not in groups["decay"]


def test_optimizer_takes_every_value_of_the_section() -> None:
    section = AdamW(kind="adamw", lr=0.01, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(AutoModelForCausalLM.from_config(CONFIG), section)
    decayed, plain = optimizer.param_groups
    assert (decayed["lr"], decayed["weight_decay"], decayed["betas"], decayed["eps"]) == (0.01, 0.3, (0.8, 0.9), 1e-6)
    assert plain["weight_decay"] == 0.0
    assert decayed["fused"]


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        build_optimizer(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16), AdamW(kind="adamw", lr=0.01))
