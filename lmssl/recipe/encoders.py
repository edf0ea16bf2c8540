"""Sections `model` of bidirectional encoders and of T5's family, with transformers' own field names.

Dropout is 0 here where the classes have 0.1: pretraining of few epochs is better without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from lmssl.recipe.base import Activation, Float, Int
from lmssl.recipe.family import BuiltModel, DrawnModel, RotaryModel


class _BertLike(DrawnModel):
    """Fields of bert and those built after it."""

    hidden_size: Int = Field(ge=1)
    intermediate_size: Int = Field(ge=1)
    num_hidden_layers: Int = Field(ge=1)
    num_attention_heads: Int = Field(ge=1)
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Float = Field(default=0.0, ge=0, lt=1)
    attention_probs_dropout_prob: Float = Field(default=0.0, ge=0, lt=1)


class BertModel(_BertLike):
    """`BertForMaskedLM`."""

    kind: Literal["bert"]
    type_vocab_size: Int = Field(default=2, ge=1)
    """Kinds of sentences; all tokens are of the first."""
    layer_norm_eps: Float = Field(default=1e-12, gt=0)


class RobertaModel(_BertLike):
    """`RobertaForMaskedLM`."""

    kind: Literal["roberta"]
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length` + pad id + 1, because positions begin after the pad id."""
    type_vocab_size: Int = Field(default=1, ge=1)
    """Kinds of sentences; all tokens are of the first."""
    layer_norm_eps: Float = Field(default=1e-5, gt=0)


class ElectraModel(_BertLike):
    """`ElectraForMaskedLM`, a generator; with the objective `replaced`, `ElectraForPreTraining` and a generator."""

    kind: Literal["electra"]
    embedding_size: Int = Field(ge=1)
    """Width of the embedding, which a matrix brings to `hidden_size` where they differ."""
    type_vocab_size: Int = Field(default=2, ge=1)
    """Kinds of sentences; all tokens are of the first."""
    layer_norm_eps: Float = Field(default=1e-12, gt=0)


class ModernBertModel(DrawnModel):
    """`ModernBertForMaskedLM`: rotary positions, gated units, and most layers see a neighbourhood only."""

    kind: Literal["modernbert"]
    hidden_size: Int = Field(ge=1)
    intermediate_size: Int = Field(ge=1)
    """Width of the gated unit; its first matrix has twice as many columns."""
    num_hidden_layers: Int = Field(ge=1)
    num_attention_heads: Int = Field(ge=1)
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    global_attn_every_n_layers: Int = Field(default=3, ge=1)
    """The first of every so many layers sees the whole document."""
    local_attention: Int = Field(default=128, ge=2)
    """Tokens that the other layers see, half of them to each side."""
    global_rope_theta: Float = Field(default=160_000.0, gt=0)
    local_rope_theta: Float = Field(default=10_000.0, gt=0)
    hidden_activation: Activation = "gelu"
    initializer_cutoff_factor: Float = Field(default=2.0, gt=0)
    """Initial weights are within so many standard deviations."""
    norm_eps: Float = Field(default=1e-5, gt=0)
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: Float = Field(default=0.0, ge=0, lt=1)
    embedding_dropout: Float = Field(default=0.0, ge=0, lt=1)
    mlp_bias: bool = False
    mlp_dropout: Float = Field(default=0.0, ge=0, lt=1)
    decoder_bias: bool = True
    """Of the head."""
    classifier_bias: bool = False
    """Of the head's transform."""
    classifier_activation: Activation = "gelu"


class EuroBertModel(RotaryModel):
    """`EuroBertForMaskedLM`: llama, seeing in both directions."""

    kind: Literal["eurobert"]
    rms_norm_eps: Float = Field(default=1e-5, gt=0)
    mlp_bias: bool = False
    """Of the feed-forward layers, and of the head."""


class DistilBertModel(DrawnModel):
    """`DistilBertForMaskedLM`."""

    kind: Literal["distilbert"]
    dim: Int = Field(ge=1)
    hidden_dim: Int = Field(ge=1)
    """Width of the feed-forward layers."""
    n_layers: Int = Field(ge=1)
    n_heads: Int = Field(ge=1)
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    activation: Activation = "gelu"
    dropout: Float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: Float = Field(default=0.0, ge=0, lt=1)


class T5Model(BuiltModel):
    """`T5ForConditionalGeneration`, `UMT5...` (a position bias in every layer) and `MT5...` (unscaled outputs)."""

    kind: Literal["t5", "umt5", "mt5"]
    tie_word_embeddings: Literal[True] = True
    """One matrix for both embeddings and the head; transformers knows no other form."""
    d_model: Int = Field(ge=1)
    d_ff: Int = Field(ge=1)
    num_layers: Int = Field(ge=1)
    """Of the encoder."""
    num_heads: Int = Field(ge=1)
    num_decoder_layers: Int | None = Field(default=None, ge=1)
    """Null: as many as the encoder has."""
    d_kv: Int | None = Field(default=None, ge=1)
    """Width of a head; null: d_model / num_heads."""
    relative_attention_num_buckets: Int = Field(default=32, ge=2)
    relative_attention_max_distance: Int = Field(default=128, ge=2)
    feed_forward_proj: Literal["relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu"] = (
        "gated-gelu"
    )
    """An activation, after `gated-` with a gate: `relu` is T5's own, `gated-gelu` that of version 1.1."""
    dropout_rate: Float = Field(default=0.0, ge=0, lt=1)
    layer_norm_epsilon: Float = Field(default=1e-6, gt=0)
    initializer_factor: Float = Field(default=1.0, gt=0)
    """Factor of the standard deviations of initial weights."""


def generator_sizes(hidden_size: int, num_attention_heads: int, intermediate_size: int, ratio: float) -> dict[str, int]:
    """Sizes of ELECTRA's generator: the model's times `ratio`, with a number of heads that divides the width.

    Source: ELECTRA (Clark et al. 2020); the released code makes heads 64 wide whatever the model's are.

    >>> generator_sizes(256, 4, 1024, 0.25)
    {'hidden_size': 64, 'num_attention_heads': 1, 'intermediate_size': 256}
    """
    width = max(1, round(hidden_size * ratio))
    heads = max(1, round(num_attention_heads * ratio))
    heads = next(number for number in range(heads, 0, -1) if width % number == 0)
    inner = max(1, round(intermediate_size * ratio))
    return {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner}


EncoderModel = BertModel | RobertaModel | ElectraModel | ModernBertModel | EuroBertModel | DistilBertModel


def encoder_sizes(model: EncoderModel | T5Model, sequence_length: int, pad_id: int | None) -> dict[str, int]:
    """Values of size fields that may be null in the recipe; roberta's positions only if the pad id is known."""
    if isinstance(model, RobertaModel):
        return {} if pad_id is None else {"max_position_embeddings": sequence_length + pad_id + 1}
    if isinstance(model, T5Model):
        return {"num_decoder_layers": model.num_layers, "d_kv": model.d_model // model.num_heads}
    sizes = {"max_position_embeddings": sequence_length}
    if isinstance(model, EuroBertModel):
        sizes["num_key_value_heads"] = model.num_attention_heads
        sizes["head_dim"] = model.hidden_size // model.num_attention_heads
    return sizes


def encoder_problems(model: EncoderModel | T5Model) -> Iterator[str]:
    """Sentences `path: what; remedy` for sizes that do not go together."""
    width, heads = ("dim", "n_heads") if isinstance(model, DistilBertModel) else ("hidden_size", "num_attention_heads")
    if isinstance(model, T5Model):
        width, heads = "d_model", "num_heads"
    free = {EuroBertModel: "head_dim", T5Model: "d_kv"}.get(type(model))
    if (free is None or getattr(model, free) is None) and getattr(model, width) % getattr(model, heads):
        remedy = "change one of them" + (f", or give model.{free}" if free else "")
        found = f"{getattr(model, width)} is not a multiple of model.{heads}={getattr(model, heads)}"
        yield f"model.{width}: {found}; {remedy}"
    elif isinstance(model, ModernBertModel | EuroBertModel):
        head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        if head_dim % 2:
            yield f"model.hidden_size: heads of {head_dim} numbers cannot be rotated in pairs; make the width even"
    if isinstance(model, EuroBertModel) and model.num_key_value_heads is not None:
        groups = model.num_key_value_heads
        if model.num_attention_heads % groups:
            yield (
                f"model.num_key_value_heads: {groups} does not divide "
                f"model.num_attention_heads={model.num_attention_heads}; change one"
            )
    if isinstance(model, BertModel | RobertaModel) and not model.tie_word_embeddings:
        yield (
            f"model.tie_word_embeddings: {model.kind}'s class has two biases if its matrices are not tied, and uses "
            "one of them; leave it out"
        )
