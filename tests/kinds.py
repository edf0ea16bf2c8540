"""Tiny `model` sections of every encoder family, and models of them whose every parameter matters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lmssl.model.build import build_config, build_model
from lmssl.recipe.model import FAMILIES, OtherModel

_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MASKED: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT | {"embedding_size": 16},
    "modernbert": _BERT
    | {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4, "global_rope_theta": 500.0},
    "eurobert": _BERT | {"num_key_value_heads": 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}
SPAN: dict[str, dict[str, Any]] = {
    kind: {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4} for kind in ("t5", "umt5", "mt5")
}
VOCAB, PAD = 101, 3


class Tokens:
    """Ids of control tokens, the first of the vocabulary."""

    num_tokens, bos_id, eos_id, unk_id, pad_id, cls_id, sep_id, mask_id = 101, None, 7, None, PAD, 4, 5, 6


def tiny(kind: str, *, objective: str = "masked", sequence_length: int = 40, **change: Any) -> PreTrainedModel:
    """A model in evaluation mode, its vectors drawn too, so that no bias is 0 and no norm 1."""
    sizes = {**MASKED, **SPAN}.get(kind, _BERT)
    section = FAMILIES.get(kind, OtherModel).model_validate({"kind": kind, **sizes, **change})
    tokenizer: Any = Tokens()
    config = build_config(
        section, objective=objective, vocab_size=VOCAB, sequence_length=sequence_length, tokenizer=tokenizer
    )
    model = build_model(config, objective=objective, seed=1)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
    return model.eval()


def with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with one of transformers' own attentions in all its parts."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)
    return model
