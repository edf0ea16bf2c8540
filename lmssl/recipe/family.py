"""What the classes of all families of models share; the families are in `encoders` and `model`."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from lmssl.recipe.base import Float, Int, Section


class ModelBase(Section):
    """Fields every family shares; null: derived from tokenizer and data."""

    model_config = ConfigDict(protected_namespaces=())

    vocab_size: Int | None = Field(default=None, ge=1)
    """Rows of the embedding; null: the tokenizer's size rounded up to `tokenizer.pad_to_multiple`."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""


class DrawnModel(ModelBase):
    """Families whose initial weights have one standard deviation."""

    initializer_range: Float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights."""


class RotaryModel(DrawnModel):
    """Fields of llama and those built after it."""

    kind: str
    hidden_size: Int = Field(ge=1)
    intermediate_size: Int = Field(ge=1)
    num_hidden_layers: Int = Field(ge=1)
    num_attention_heads: Int = Field(ge=1)
    num_key_value_heads: Int | None = Field(default=None, ge=1)
    """Null: as many as attention heads."""
    head_dim: Int | None = Field(default=None, ge=1)
    """Null: hidden_size / num_attention_heads."""
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    rope_theta: Float = Field(default=10_000.0, gt=0)
    rms_norm_eps: Float = Field(default=1e-6, gt=0)
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: Float = Field(default=0.0, ge=0, lt=1)
