"""Which matrices a weight holds, against what the stock classes do with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    ModernBertConfig,
    Phi3Config,
)

from lmssl.errors import ModelError
from lmssl.optim.groups import parameter_roles
from lmssl.optim.parts import Parts, matrix_parts

HIDDEN = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))


def parts_of(model: nn.Module) -> dict[str, Parts]:
    return matrix_parts(model, [name for name, role in parameter_roles(model).items() if role == "matrix"])


def outputs(weight: Tensor, parts: Parts) -> list[Tensor]:
    """What each matrix of a weight makes of `HIDDEN`."""
    matrices = parts.split(weight)
    assert torch.equal(parts.join(matrices), weight)
    return [HIDDEN @ (matrix if parts.dim == 1 else matrix.mT) for matrix in matrices]


def test_gpt2_keeps_three_projections_in_transposed_columns() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    layer = model.transformer.h[0].attn
    with torch.no_grad():
        layer.c_attn.bias.zero_()
    parts = parts_of(model)
    found = outputs(layer.c_attn.weight, parts["transformer.h.0.attn.c_attn.weight"])
    for ours, theirs in zip(found, layer.c_attn(HIDDEN).split(layer.split_size, dim=2), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert parts["transformer.h.0.mlp.c_fc.weight"] == Parts()


def test_modernbert_keeps_projections_and_gate_in_rows() -> None:
    config = ModernBertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    model = AutoModelForMaskedLM.from_config(config)
    layer, parts = model.model.layers[0], parts_of(model)
    qkv = layer.attn.Wqkv(HIDDEN).view(1, 5, 3, 2, 8).unbind(2)
    found = outputs(layer.attn.Wqkv.weight, parts["model.layers.0.attn.Wqkv.weight"])
    for ours, theirs in zip(found, qkv, strict=True):
        torch.testing.assert_close(ours, theirs.flatten(2))
    halves = layer.mlp.Wi(HIDDEN).chunk(2, dim=-1)
    for ours, theirs in zip(outputs(layer.mlp.Wi.weight, parts["model.layers.0.mlp.Wi.weight"]), halves, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert parts["head.dense.weight"] == Parts()


def test_phi3_has_fewer_keys_than_queries() -> None:
    config = Phi3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    parts = parts_of(model)
    assert parts["model.layers.0.self_attn.qkv_proj.weight"].sizes == (16, 8, 8)
    assert parts["model.layers.0.mlp.gate_up_proj.weight"].sizes == (24, 24)


def test_gpt_neox_mixes_projections_head_by_head() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    layer = model.gpt_neox.layers[0].attention
    with torch.no_grad():
        layer.query_key_value.bias.zero_()
    theirs = layer.query_key_value(HIDDEN).view(1, 5, 2, 3 * 8).chunk(3, dim=-1)
    parts = parts_of(model)["gpt_neox.layers.0.attention.query_key_value.weight"]
    for ours, part in zip(outputs(layer.query_key_value.weight, parts), theirs, strict=True):
        torch.testing.assert_close(ours, part.flatten(2))


def test_what_is_joined_in_an_unknown_way_is_refused() -> None:
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"query_key_value.*how is not known of bloom") as caught:
        parts_of(bloom)
    assert "use optim.kind: adamw" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="weight has 3 dimensions, and Muon updates matrices"):
        matrix_parts(nn.Conv1d(3, 4, 5), ["weight"])
