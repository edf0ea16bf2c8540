"""Tiny models and tokenizers that can be written as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmssl.tokenizer.load import Tokenizer, load_tokenizer

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
