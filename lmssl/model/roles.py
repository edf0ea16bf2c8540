"""How many tensors and parameters of the shipped families have which role, by closed formulas; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lmssl.errors import ModelError
from lmssl.recipe.encoders import (
    BertModel,
    DistilBertModel,
    ElectraModel,
    EuroBertModel,
    ModernBertModel,
    RobertaModel,
    T5Model,
    generator_sizes,
)
from lmssl.recipe.family import ModelBase
from lmssl.recipe.model import Gpt2Model, LlamaModel, Qwen3Model, null_sizes
from lmssl.recipe.objective import AnyObjective, MaskedObjective, ReplacedObjective
from lmssl.recipe.optim import ROLES, Role


class Count(NamedTuple):
    """Of one role."""

    num_tensors: int
    num_parameters: int


class _Weights(NamedTuple):
    """Sizes of weights of one role, and how often all of them are there."""

    role: Role
    sizes: Sequence[int]
    times: int = 1


def role_counts(
    model: ModelBase, objective: AnyObjective, *, vocab_size: int, sequence_length: int, pad_id: int | None = None
) -> dict[Role, Count]:
    """Tensors and parameters of each role of what an objective trains, a shared matrix counted once.

    Args:
        vocab_size, sequence_length, pad_id: as for `flops.num_parameters`.
    Raises:
        ModelError: the family is not a shipped one.

    >>> from lmssl.recipe.objective import CausalObjective
    >>> gpt2 = Gpt2Model(kind="gpt2", n_embd=64, n_layer=2, n_head=4)
    >>> found = role_counts(gpt2, CausalObjective(kind="causal"), vocab_size=1000, sequence_length=128)
    >>> found["matrix"], found["vector"]
    (Count(num_tensors=8, num_parameters=98304), Count(num_tensors=18, num_parameters=1792))
    """
    sizes = null_sizes(model, sequence_length, pad_id=pad_id or 0)
    given = model.model_copy(update=sizes)
    found = [*_family(given, vocab_size)]
    if isinstance(given, BertModel) and isinstance(objective, MaskedObjective) and objective.sentence_task is not None:
        width = given.hidden_size
        found += [_Weights("matrix", [width * width]), _Weights("head", [2 * width]), _Weights("vector", [width, 2])]
    if isinstance(given, ElectraModel) and isinstance(objective, ReplacedObjective):
        found = [*_electra_pair(given, objective, vocab_size)]
    return {role: _count(weights for weights in found if weights.role == role) for role in ROLES}


def _count(weights: Iterable[_Weights]) -> Count:
    there = [part for part in weights if part.times]
    return Count(sum(len(w.sizes) * w.times for w in there), sum(sum(w.sizes) * w.times for w in there))


def _family(model: ModelBase, vocab_size: int) -> Iterable[_Weights]:
    match model:
        case LlamaModel() | Qwen3Model() | EuroBertModel():
            return _rotary(model, vocab_size)
        case Gpt2Model():
            return _gpt2(model, vocab_size)
        case ElectraModel():
            return [*_electra_body(model, vocab_size), *_electra_head(model, vocab_size)]
        case BertModel() | RobertaModel():
            return _bert(model, vocab_size)
        case DistilBertModel():
            return _distilbert(model, vocab_size)
        case ModernBertModel():
            return _modernbert(model, vocab_size)
        case T5Model():
            return _t5(model, vocab_size)
    raise ModelError(
        f"there is no formula for the weights of kind {getattr(model, 'kind', '?')}",
        where="model.kind",
        remedy="count the built model: `lmssl show RECIPE --model`",
    )


def _head(model: ModelBase, width: int, vocab_size: int) -> _Weights:
    tied = getattr(model, "tie_word_embeddings", True)
    return _Weights("head", [vocab_size * width], times=0 if tied else 1)


def _rotary(model: LlamaModel | Qwen3Model | EuroBertModel, vocab_size: int) -> Iterable[_Weights]:
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    head_dim = model.head_dim or 0
    queries, keys = model.num_attention_heads * head_dim, (model.num_key_value_heads or 0) * head_dim
    yield _Weights("embedding", [vocab_size * width])
    yield _Weights("matrix", [width * queries, width * keys, width * keys, queries * width], layers)
    yield _Weights("matrix", [width * inner] * 3, layers)
    yield _Weights("vector", [width, width], layers)
    yield _Weights("vector", [width])
    if model.attention_bias:
        yield _Weights("vector", [queries, keys, keys, width], layers)
    if isinstance(model, Qwen3Model):
        yield _Weights("vector", [head_dim, head_dim], layers)
    elif model.mlp_bias:
        yield _Weights("vector", [inner, inner, width], layers)
        if isinstance(model, EuroBertModel):
            yield _Weights("vector", [vocab_size])
    yield _head(model, width, vocab_size)


def _gpt2(model: Gpt2Model, vocab_size: int) -> Iterable[_Weights]:
    width, inner = model.n_embd, model.n_inner or 4 * model.n_embd
    yield _Weights("embedding", [vocab_size * width, (model.n_positions or 0) * width])
    yield _Weights("matrix", [3 * width * width, width * width, width * inner, inner * width], model.n_layer)
    yield _Weights("vector", [width] * 4 + [3 * width, width, inner, width], model.n_layer)
    yield _Weights("vector", [width, width])
    yield _head(model, width, vocab_size)


def _bert_layers(width: int, inner: int, layers: int) -> Iterable[_Weights]:
    yield _Weights("matrix", [width * width] * 4 + [width * inner] * 2, layers)
    yield _Weights("vector", [width] * 4 + [inner, width] + [width] * 4, layers)


def _bert(model: BertModel | RobertaModel, vocab_size: int) -> Iterable[_Weights]:
    width, positions = model.hidden_size, model.max_position_embeddings or 0
    yield _Weights("embedding", [vocab_size * width, positions * width, model.type_vocab_size * width])
    yield _Weights("vector", [width, width])
    yield from _bert_layers(width, model.intermediate_size, model.num_hidden_layers)
    yield _Weights("matrix", [width * width])
    yield _Weights("vector", [width, width, width, vocab_size])
    yield _head(model, width, vocab_size)


def _electra_body(model: ElectraModel, vocab_size: int, *, embeddings: bool = True) -> Iterable[_Weights]:
    width, narrow, positions = model.hidden_size, model.embedding_size, model.max_position_embeddings or 0
    if embeddings:
        yield _Weights("embedding", [vocab_size * narrow, positions * narrow, model.type_vocab_size * narrow])
        yield _Weights("vector", [narrow, narrow])
    if narrow != width:
        yield _Weights("matrix", [narrow * width])
        yield _Weights("vector", [width])
    yield from _bert_layers(width, model.intermediate_size, model.num_hidden_layers)


def _electra_head(model: ElectraModel, vocab_size: int) -> Iterable[_Weights]:
    yield _Weights("matrix", [model.hidden_size * model.embedding_size])
    yield _Weights("vector", [model.embedding_size] * 3 + [vocab_size])
    yield _head(model, model.embedding_size, vocab_size)


def _electra_pair(model: ElectraModel, objective: ReplacedObjective, vocab_size: int) -> Iterable[_Weights]:
    """The discriminator, with a head that says yes or no, and the generator with the same embeddings."""
    width, heads, inner = model.hidden_size, model.num_attention_heads, model.intermediate_size
    narrower = model.model_copy(update=generator_sizes(width, heads, inner, objective.generator_ratio))
    yield from _electra_body(model, vocab_size)
    yield _Weights("matrix", [width * width])
    yield _Weights("head", [width])
    yield _Weights("vector", [width, 1])
    yield from _electra_body(narrower, vocab_size, embeddings=False)
    yield from _electra_head(narrower, vocab_size)


def _distilbert(model: DistilBertModel, vocab_size: int) -> Iterable[_Weights]:
    width = model.dim
    yield _Weights("embedding", [vocab_size * width, (model.max_position_embeddings or 0) * width])
    yield _Weights("vector", [width, width])
    yield from _bert_layers(width, model.hidden_dim, model.n_layers)
    yield _Weights("matrix", [width * width])
    yield _Weights("vector", [width, width, width, vocab_size])
    yield _head(model, width, vocab_size)


def _modernbert(model: ModernBertModel, vocab_size: int) -> Iterable[_Weights]:
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    norm = [width] * (2 if model.norm_bias else 1)
    yield _Weights("embedding", [vocab_size * width])
    yield _Weights("matrix", [3 * width * width, width * width, 2 * inner * width, inner * width], layers)
    # Two norms in a layer, but one in the first; those of embedding, stack and head.
    yield _Weights("vector", norm, 2 * layers - 1 + 3)
    if model.attention_bias:
        yield _Weights("vector", [3 * width, width], layers)
    if model.mlp_bias:
        yield _Weights("vector", [2 * inner, width], layers)
    yield _Weights("matrix", [width * width])
    yield _Weights("vector", [width], times=int(model.classifier_bias))
    yield _Weights("vector", [vocab_size], times=int(model.decoder_bias))
    yield _head(model, width, vocab_size)


def _t5(model: T5Model, vocab_size: int) -> Iterable[_Weights]:
    width, inner = model.d_model, model.num_heads * (model.d_kv or 0)
    encoders, decoders = model.num_layers, model.num_decoder_layers or 0
    feed = [width * model.d_ff] * (3 if model.feed_forward_proj.startswith("gated") else 2)
    biases = encoders + decoders if model.kind == "umt5" else 2
    yield _Weights("embedding", [vocab_size * width])
    yield _Weights("embedding", [model.relative_attention_num_buckets * model.num_heads], biases)
    yield _Weights("matrix", [width * inner] * 4 + feed, encoders)
    yield _Weights("matrix", [width * inner] * 8 + feed, decoders)
    yield _Weights("vector", [width], 2 * encoders + 3 * decoders + 2)
