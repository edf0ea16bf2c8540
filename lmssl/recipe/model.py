"""The section `model`: transformers' own field names, one class per shipped family.

Size fields have no default here, because transformers' defaults are those of the largest published model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from lmssl.recipe.base import Activation, Float, Int
from lmssl.recipe.encoders import (
    BertModel,
    DistilBertModel,
    ElectraModel,
    EncoderModel,
    EuroBertModel,
    ModernBertModel,
    RobertaModel,
    T5Model,
    encoder_sizes,
)
from lmssl.recipe.family import ContinuedModel, DrawnModel, ModelBase, RotaryModel
from lmssl.recipe.words import one_of


class LlamaModel(RotaryModel):
    """`LlamaForCausalLM`."""

    kind: Literal["llama"]
    mlp_bias: bool = False


class Qwen3Model(RotaryModel):
    """`Qwen3ForCausalLM`: llama with normalised queries and keys."""

    kind: Literal["qwen3"]


class Gpt2Model(DrawnModel):
    """`GPT2LMHeadModel`; dropout is off, as pretraining of one epoch wants it."""

    kind: Literal["gpt2"]
    n_embd: Int = Field(ge=1)
    n_layer: Int = Field(ge=1)
    n_head: Int = Field(ge=1)
    n_positions: Int | None = Field(default=None, ge=1)
    """Null: `data.sequence_length`."""
    n_inner: Int | None = Field(default=None, ge=1)
    """Null: 4 x n_embd."""
    activation_function: Activation = "gelu_new"
    resid_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    embd_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    attn_pdrop: Float = Field(default=0.0, ge=0, lt=1)
    layer_norm_epsilon: Float = Field(default=1e-5, gt=0)


class OtherModel(DrawnModel):
    """Any other `model_type` of transformers; its field names are checked when the model is built."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    kind: str


_NEEDS: dict[str, tuple[Any, str]] = {
    "masked": (EncoderModel, "a bidirectional encoder"),
    "replaced": (ElectraModel, "a generator and a discriminator"),
    "span": (T5Model, "an encoder with a decoder"),
}
_DECODERS = LlamaModel | Qwen3Model | Gpt2Model


def lacking_kind(model: ModelBase, objective: str) -> str | None:
    """What is wrong where a shipped family is not what an objective trains; of others, the model's builder says it."""
    classes, what = _NEEDS.get(objective, (_DECODERS, "a decoder"))
    if isinstance(model, classes) or not isinstance(model, (_DECODERS, EncoderModel, T5Model)):
        return None
    kind = getattr(model, "kind", "")
    fitting = [name for name, family in FAMILIES.items() if issubclass(family, classes)]
    own = "span" if isinstance(model, T5Model) else "masked" if isinstance(model, EncoderModel) else "causal"
    if own == "causal" and objective == "masked":
        own = "hybrid"  # masked tokens for a decoder
    use = one_of([*fitting, f"objective.kind: {own}"])
    return f"the objective {objective} needs {what}, and {kind} is none; use {use}"


FAMILIES: dict[str, type[ModelBase]] = {
    "llama": LlamaModel,
    "qwen3": Qwen3Model,
    "gpt2": Gpt2Model,
    "bert": BertModel,
    "roberta": RobertaModel,
    "electra": ElectraModel,
    "modernbert": ModernBertModel,
    "eurobert": EuroBertModel,
    "distilbert": DistilBertModel,
    "t5": T5Model,
    "umt5": T5Model,
    "mt5": T5Model,
}


def _family(value: Any) -> str:
    if isinstance(value, ContinuedModel) or (isinstance(value, dict) and {"from", "source"} & value.keys()):
        return "from"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    return "t5" if family is T5Model else str(kind) if family else "other"


ModelSection = Annotated[
    Annotated[LlamaModel, Tag("llama")]
    | Annotated[Qwen3Model, Tag("qwen3")]
    | Annotated[Gpt2Model, Tag("gpt2")]
    | Annotated[BertModel, Tag("bert")]
    | Annotated[RobertaModel, Tag("roberta")]
    | Annotated[ElectraModel, Tag("electra")]
    | Annotated[ModernBertModel, Tag("modernbert")]
    | Annotated[EuroBertModel, Tag("eurobert")]
    | Annotated[DistilBertModel, Tag("distilbert")]
    | Annotated[T5Model, Tag("t5")]
    | Annotated[ContinuedModel, Tag("from")]
    | Annotated[OtherModel, Tag("other")],
    Discriminator(_family),
]


def null_sizes(model: ModelBase, sequence_length: int, *, pad_id: int | None = None) -> dict[str, int]:
    """Values of the shipped families' size fields that are null in the recipe; some follow from the pad id."""
    sizes: dict[str, int] = {}
    if isinstance(model, LlamaModel | Qwen3Model):
        sizes = {
            "num_key_value_heads": model.num_attention_heads,
            "head_dim": model.hidden_size // model.num_attention_heads,
            "max_position_embeddings": sequence_length,
        }
    elif isinstance(model, Gpt2Model):
        sizes = {"n_positions": sequence_length, "n_inner": 4 * model.n_embd}
    elif isinstance(model, EncoderModel | T5Model):
        sizes = encoder_sizes(model, sequence_length, pad_id)
    return {key: value for key, value in sizes.items() if getattr(model, key) is None}
