"""What the classes of all families of models share; the families are in `encoders` and `model`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from lmssl.recipe.base import Activation, Float, Int, Section


class ModelBase(Section):
    """Fields every family shares; null: derived from tokenizer and data."""

    model_config = ConfigDict(protected_namespaces=())

    vocab_size: Int | None = Field(default=None, ge=1)
    """Rows of the embedding; null: the tokenizer's size rounded up to `tokenizer.pad_to_multiple`."""


class ContinuedModel(ModelBase):
    """A model that exists: continued pretraining of its weights.

    What stands here replaces a value of its config; everything else is as it was trained.
    """

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    kind: Literal["from"] = "from"
    source: str = Field(alias="from", min_length=1)
    """A folder with config.json and safetensors, a run folder (its newest checkpoint), or a name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: the newest."""
    max_position_embeddings: Int | None = Field(default=None, ge=1)
    """Null: the model's own. More than that only where positions are not learned."""
    rope_theta: Float | None = Field(default=None, gt=0)
    """Base of rotary positions, of ModernBERT in its global layers; null: the model's own."""
    dropout: Float | None = Field(default=None, ge=0, lt=1)
    """All dropout of the body; null: the model's own."""
    new_tokens: Literal["parts", "mean"] = "parts"
    """Rows of tokens that the model's tokenizer lacks: the mean of the rows of what it makes of the token's text, or
    of all rows."""


class BuiltModel(ModelBase):
    """Families that are built from nothing."""

    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""


class DrawnModel(BuiltModel):
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
    hidden_act: Activation = "silu"
    attention_bias: bool = False
    attention_dropout: Float = Field(default=0.0, ge=0, lt=1)
