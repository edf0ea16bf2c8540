from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lmssl.errors import ModelError
from lmssl.model.build import build_config, build_model
from lmssl.model.flops import flops_per_token, has_formula, num_parameters, training_memory
from lmssl.recipe.model import FAMILIES, ModelBase, OtherModel

VOCAB, LENGTH = 1024, 256
ROTARY = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 6}
GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 4}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", ROTARY),
    ("llama", {**ROTARY, "num_key_value_heads": 2}),
    ("llama", {**ROTARY, "head_dim": 48, "tie_word_embeddings": False}),
    ("llama", {**ROTARY, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3}),
    ("qwen3", ROTARY),
    ("qwen3", {**ROTARY, "head_dim": 64, "num_key_value_heads": 2}),
    ("qwen3", {**ROTARY, "attention_bias": True, "tie_word_embeddings": False, "head_dim": 16}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 100, "n_positions": 512}),
    ("gpt2", {**GPT2, "tie_word_embeddings": False}),
]


def section(kind: str, sizes: dict[str, Any]) -> ModelBase:
    return FAMILIES[kind].model_validate({"kind": kind, **sizes})


def built(model: ModelBase) -> PreTrainedModel:
    config = build_config(model, vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None)
    return build_model(config, seed=0, device="meta")


@pytest.mark.parametrize(("kind", "sizes"), SHAPES)
def test_parameters_are_those_of_the_built_model(kind: str, sizes: dict[str, Any]) -> None:
    model = section(kind, sizes)
    stock = built(model)
    counted = num_parameters(model, vocab_size=VOCAB, sequence_length=LENGTH)
    assert counted.total == sum(p.numel() for p in stock.parameters())
    head = stock.get_output_embeddings().weight
    assert counted.head == (0 if model.tie_word_embeddings else head.numel())
    body = {name: p for name, p in stock.base_model.named_parameters() if not name.startswith(("embed_", "wte", "wpe"))}
    assert counted.body == sum(p.numel() for p in body.values())


@pytest.mark.parametrize(("kind", "sizes"), SHAPES)
def test_flops_are_six_per_weight_of_a_product_and_token(kind: str, sizes: dict[str, Any]) -> None:
    model = section(kind, sizes)
    stock = built(model)
    config = stock.config
    layers = [p for name, p in stock.named_parameters() if p.ndim == 2 and ("layers." in name or ".h." in name)]
    products = sum(p.numel() for p in layers) + VOCAB * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * LENGTH
    assert flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) == 6 * products + 6 * attention


def test_flops_agree_with_a_counted_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = section("llama", {**ROTARY, "num_key_value_heads": 2})
    config = build_config(model, vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None)
    stock = build_model(config, seed=0)
    stock.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    ours = flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) * LENGTH / 3
    pairs = 2 * ROTARY["num_hidden_layers"] * ROTARY["hidden_size"] * LENGTH * LENGTH  # the half that is masked
    # The rotary angles are a product of positions and frequencies, too small to belong in a formula.
    assert counter.get_total_flops() == pytest.approx(ours + pairs, rel=1e-3)


def test_memory_is_sixteen_bytes_a_parameter() -> None:
    memory = training_memory(1000)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.total) == (4000, 4000, 8000, 16000)


def test_other_families_have_no_formula() -> None:
    other = OtherModel.model_validate({"kind": "olmo2", "hidden_size": 64})
    assert not has_formula(other)
    assert has_formula(section("gpt2", GPT2))
    with pytest.raises(ModelError, match="no formula for the size of kind olmo2") as caught:
        num_parameters(other, vocab_size=VOCAB, sequence_length=LENGTH)
    assert caught.value.remedy is not None
