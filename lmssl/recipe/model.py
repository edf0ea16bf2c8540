"""The section `model`: transformers' own field names, one class per shipped family.

Size fields have no default here, because transformers' defaults are those of the largest published model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from lmssl.recipe.base import Float, Int, Section


class ModelBase(Section):
    """Fields every family shares; null: derived from tokenizer and data."""

    model_config = ConfigDict(protected_namespaces=())

    vocab_size: Int | None = Field(default=None, ge=1)
    """Rows of the embedding; null: the tokenizer's size rounded up to `tokenizer.pad_to_multiple`."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""
    initializer_range: Float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights."""


class LlamaModel(ModelBase):
    """`LlamaForCausalLM`."""

    kind: Literal["llama"]
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
    mlp_bias: bool = False


class Qwen3Model(ModelBase):
    """`Qwen3ForCausalLM`: llama with normalised queries and keys."""

    kind: Literal["qwen3"]
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


class Gpt2Model(ModelBase):
    """`GPT2LMHeadModel`; dropout is off, as pretraining of one epoch wants it."""

    kind: Literal["gpt2"]
    n_embd: Int = Field(ge=1)
    n_layer: Int = Field(ge=1)
    n_head: Int = Field(ge=1)
    n_positions: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    n_inner: Int | None = Field(default=None, ge=1)
    """Null: 4 x n_embd."""
    activation_function: str = "gelu_new"
    resid_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    embd_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    attn_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    layer_norm_epsilon: Float = Field(default=1e-5, gt=0)


class OtherModel(ModelBase):
    """Any other `model_type` of transformers; its field names are checked when the model is built."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    kind: str


FAMILIES: dict[str, type[ModelBase]] = {"llama": LlamaModel, "qwen3": Qwen3Model, "gpt2": Gpt2Model}


def _family(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in FAMILIES else "other"


ModelSection = Annotated[
    Annotated[LlamaModel, Tag("llama")]
    | Annotated[Qwen3Model, Tag("qwen3")]
    | Annotated[Gpt2Model, Tag("gpt2")]
    | Annotated[OtherModel, Tag("other")],
    Discriminator(_family),
]


def null_sizes(model: ModelBase, sequence_length: int) -> dict[str, int]:
    """Values of the shipped families' size fields that are null in the recipe."""
    sizes: dict[str, int] = {}
    if isinstance(model, LlamaModel | Qwen3Model):
        sizes = {
            "num_key_value_heads": model.num_attention_heads,
            "head_dim": model.hidden_size // model.num_attention_heads,
            "max_position_embeddings": sequence_length,
        }
    elif isinstance(model, Gpt2Model):
        sizes = {"n_positions": sequence_length, "n_inner": 4 * model.n_embd}
    return {key: value for key, value in sizes.items() if getattr(model, key) is None}
