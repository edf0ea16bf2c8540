"""Parameters, training FLOPs and memory of the shipped families, by closed formulas; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

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
from lmssl.recipe.model import FAMILIES, Gpt2Model, LlamaModel, Qwen3Model, null_sizes
from lmssl.recipe.objective import AnyObjective, MaskedObjective, ReplacedObjective


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, by what they do."""

    embedding: int
    """Rows looked up: tokens, and where they are learned positions and kinds of sentences."""
    head: int
    """The output matrix when it is one of its own; 0 when it is the embedding's."""
    body: int
    """Everything between, and what a head has besides its output matrix."""

    @property
    def total(self) -> int:
        """All parameters, a shared matrix counted once."""
        return self.embedding + self.head + self.body


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that stay for the whole run, before sharding; activations and the loss come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of the three together."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class _Shape:
    """What one stack of layers has, and what stands around it."""

    width: int
    layers: int
    heads: int
    head_dim: int
    rows: int
    """Rows of learned position and sentence embeddings; 0 without them."""
    layer_matrices: int
    """Weights of one layer that multiply a token."""
    layer_vectors: int
    """Norms and biases of one layer."""
    final_vectors: int
    """Norms and biases outside of the layers, those of a masked head and its embedding's included."""
    pairs: float
    """Keys that a query meets in all layers together."""
    embedding_width: int = 0
    """0: `width`."""
    entry_matrices: int = 0
    """Weights that multiply a token before the layers."""
    head_matrices: int = 0
    """Weights that multiply a target between layers and output matrix."""
    last_matrices: int = 0
    """Weights of the last layer that multiply targets only where a masked model is trained."""


def has_formula(model: ModelBase) -> bool:
    """Whether this family is known here; of others only the built model can be counted."""
    return type(model) in FAMILIES.values()


def num_parameters(model: ModelBase, *, vocab_size: int, sequence_length: int, pad_id: int | None = None) -> Parameters:
    """Parameters of a `model` section.

    Args:
        vocab_size: rows of the embedding.
        sequence_length: tokens; the number of positions where the section does not say.
        pad_id: of the tokenizer; roberta's positions begin after it.
    Raises:
        ModelError: the family is not a shipped one.

    >>> gpt2 = Gpt2Model(kind="gpt2", n_embd=64, n_layer=2, n_head=4)
    >>> num_parameters(gpt2, vocab_size=1000, sequence_length=128)
    Parameters(embedding=72192, head=0, body=100096)
    """
    if isinstance(model, T5Model):
        return _t5_parameters(model, vocab_size)
    shape = _shape(model, vocab_size, sequence_length, pad_id or 0)
    width = shape.embedding_width or shape.width
    layers = shape.layers * (shape.layer_matrices + shape.layer_vectors)
    return Parameters(
        embedding=(vocab_size + shape.rows) * width,
        head=0 if getattr(model, "tie_word_embeddings", True) else vocab_size * width,
        body=layers + shape.entry_matrices + shape.head_matrices + shape.final_vectors,
    )


def flops_per_token(
    model: ModelBase,
    *,
    vocab_size: int,
    sequence_length: int,
    target_ratio: float = 1.0,
    last_layer_ratio: float = 1.0,
) -> int:
    """Floating-point operations of one training step per token, forward and backward.

    `6 * (layers * matrices + target_ratio * (head + vocab_size * width)) + 12 * heads * head_dim * pairs`

    A weight that multiplies a token costs a multiplication and an addition forward and twice that backward. The head
    counts, shared or not, at the targets only; looking up an embedding, norms and biases do not. Attention multiplies
    queries with keys and weights with values. A query meets half of the sequence's keys per layer in a causal model,
    all of them in a bidirectional one, and a neighbourhood in modernbert's local layers. Documents packed together
    attend to fewer pairs still, which is not counted here.

    Args:
        target_ratio: targets / tokens; 1 for causal models. For T5's family, tokens of the decoder / tokens of the
            encoder: a token is one of the encoder's.
        last_layer_ratio: tokens / all of them for which what follows the last layer's attention is computed.
    Raises:
        ModelError: the family is not a shipped one.
    Source: Kaplan et al. 2020, appendix C, and PaLM (Chowdhery et al. 2022), appendix B; differs in the pairs.
    """
    if isinstance(model, T5Model):
        return _t5_flops(model, vocab_size, sequence_length, target_ratio)
    shape = _shape(model, vocab_size, sequence_length, 0)
    head = shape.head_matrices + vocab_size * (shape.embedding_width or shape.width)
    at_targets = target_ratio * head - (1 - last_layer_ratio) * shape.last_matrices
    weights = shape.layers * shape.layer_matrices + shape.entry_matrices + round(at_targets)
    return 6 * weights + round(12 * shape.heads * shape.head_dim * shape.pairs)


def trained_parameters(
    model: ModelBase, objective: AnyObjective, *, vocab_size: int, sequence_length: int, pad_id: int | None = None
) -> Parameters:
    """`num_parameters` of what an objective trains: with ELECTRA's generator, or BERT's head for pairs of sentences.

    >>> objective = ReplacedObjective(kind="replaced", generator_ratio=0.25)
    >>> small = ElectraModel(
    ...     kind="electra", embedding_size=128, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
    ...     num_attention_heads=4, max_position_embeddings=512)  # fmt: skip
    >>> trained_parameters(small, objective, vocab_size=30522, sequence_length=128).total
    14196219
    """
    whole = num_parameters(model, vocab_size=vocab_size, sequence_length=sequence_length, pad_id=pad_id)
    body = whole.body
    if isinstance(objective, MaskedObjective) and objective.sentence_task and isinstance(model, BertModel):
        body += model.hidden_size**2 + model.hidden_size + 2 * model.hidden_size + 2
    if isinstance(objective, ReplacedObjective) and isinstance(model, ElectraModel):
        width, narrow = model.hidden_size, model.embedding_size
        generator = _generator(model, objective.generator_ratio)
        filler = num_parameters(generator, vocab_size=vocab_size, sequence_length=sequence_length)
        body += filler.body - 2 * narrow  # the norm of the embeddings is shared, too
        body += width * width + 2 * width + 1 - (width * narrow + 3 * narrow + vocab_size)  # yes or no, no tokens
    return Parameters(embedding=whole.embedding, head=whole.head, body=body)


def trained_flops_per_token(
    model: ModelBase, objective: AnyObjective, *, vocab_size: int, sequence_length: int, target_ratio: float = 1.0
) -> int:
    """`flops_per_token` of what an objective trains; masked models need the end of their last layer at targets only.

    Of ELECTRA the generator's head runs at `target_ratio` of the tokens, the discriminator's at all of them; that the
    generator's logits are computed once more for its samples is not counted. Nor is BERT's head for pairs.
    """
    sizes = {"vocab_size": vocab_size, "sequence_length": sequence_length}
    if not (isinstance(objective, ReplacedObjective) and isinstance(model, ElectraModel)):
        last = target_ratio if isinstance(objective, MaskedObjective) else 1.0
        return flops_per_token(model, **sizes, target_ratio=target_ratio, last_layer_ratio=last)
    generator, head = _generator(model, objective.generator_ratio), model.hidden_size**2 + model.hidden_size
    body = flops_per_token(model, **sizes, target_ratio=0.0)
    filler = flops_per_token(generator, **sizes, target_ratio=target_ratio, last_layer_ratio=target_ratio)
    return body + 6 * head + filler


def _generator(model: ElectraModel, ratio: float) -> ElectraModel:
    sizes = generator_sizes(model.hidden_size, model.num_attention_heads, model.intermediate_size, ratio)
    return model.model_copy(update=sizes)


def training_memory(num_parameters: int, *, num_one_state: int = 0) -> TrainingMemory:
    """Bytes of fp32 weights, gradients and AdamW's two moments.

    Args:
        num_one_state: how many of the parameters have one moment, as Muon's have.

    >>> training_memory(125_000_000).total
    2000000000
    """
    return TrainingMemory(4 * num_parameters, 4 * num_parameters, 8 * num_parameters - 4 * num_one_state)


def _shape(model: ModelBase, vocab_size: int, sequence_length: int, pad_id: int) -> _Shape:
    sizes = null_sizes(model, sequence_length, pad_id=pad_id)
    if isinstance(model, LlamaModel | Qwen3Model | EuroBertModel):
        return _rotary_shape(model, sizes, vocab_size, sequence_length)
    if isinstance(model, Gpt2Model):
        width, inner = model.n_embd, model.n_inner or sizes["n_inner"]
        return _Shape(
            width=width,
            layers=model.n_layer,
            heads=model.n_head,
            head_dim=width // model.n_head,
            rows=model.n_positions or sizes["n_positions"],
            layer_matrices=4 * width * width + 2 * width * inner,
            # Two norms with scale and shift; biases of qkv, attention output, and the two of the mlp.
            layer_vectors=4 * width + 4 * width + inner + width,
            final_vectors=2 * width,
            pairs=_causal_pairs(model.n_layer, sequence_length),
        )
    if isinstance(model, BertModel | RobertaModel | ElectraModel):
        positions = model.max_position_embeddings or sizes["max_position_embeddings"]
        return _bert_shape(model, positions + model.type_vocab_size, vocab_size, sequence_length)
    if isinstance(model, DistilBertModel):
        positions = model.max_position_embeddings or sizes["max_position_embeddings"]
        return _distilbert_shape(model, positions, vocab_size, sequence_length)
    if isinstance(model, ModernBertModel):
        return _modernbert_shape(model, vocab_size, sequence_length)
    raise ModelError(
        f"there is no formula for the size of kind {getattr(model, 'kind', '?')}",
        where="model.kind",
        remedy="count the built model: `lmssl show RECIPE --model`",
    )


def _causal_pairs(layers: int, sequence_length: int) -> float:
    return layers * sequence_length / 2


def _rotary_shape(
    model: LlamaModel | Qwen3Model | EuroBertModel, sizes: dict[str, int], vocab_size: int, sequence_length: int
) -> _Shape:
    width, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    head_dim = model.head_dim or sizes["head_dim"]
    groups = model.num_key_value_heads or sizes["num_key_value_heads"]
    queries, keys = heads * head_dim, groups * head_dim
    vectors = 2 * width
    if model.attention_bias:
        vectors += queries + 2 * keys + width
    if isinstance(model, LlamaModel | EuroBertModel) and model.mlp_bias:
        vectors += 2 * inner + width
    if isinstance(model, Qwen3Model):
        vectors += 2 * head_dim  # the norms of queries and keys
    both_ways, layers = isinstance(model, EuroBertModel), model.num_hidden_layers
    return _Shape(
        width=width,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        rows=0,
        layer_matrices=2 * width * queries + 2 * width * keys + 3 * width * inner,
        layer_vectors=vectors,
        final_vectors=width + (vocab_size if isinstance(model, EuroBertModel) and model.mlp_bias else 0),
        pairs=layers * sequence_length if both_ways else _causal_pairs(layers, sequence_length),
        last_matrices=3 * width * inner if both_ways else 0,
    )


def _bert_shape(
    model: BertModel | RobertaModel | ElectraModel, rows: int, vocab_size: int, sequence_length: int
) -> _Shape:
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    narrow = model.embedding_size if isinstance(model, ElectraModel) else width
    projected = narrow != width
    return _Shape(
        width=width,
        layers=layers,
        heads=model.num_attention_heads,
        head_dim=width // model.num_attention_heads,
        rows=rows,
        layer_matrices=4 * width * width + 2 * width * inner,
        # Two norms with scale and shift; biases of queries, keys, values, attention output, and the two of the mlp.
        layer_vectors=4 * width + 4 * width + inner + width,
        # The embedding's norm and projection; bias and norm of the transform; the bias of the output.
        final_vectors=2 * narrow + (width if projected else 0) + 3 * narrow + vocab_size,
        pairs=layers * sequence_length,
        embedding_width=narrow,
        entry_matrices=narrow * width if projected else 0,
        head_matrices=width * narrow,
        last_matrices=width * width + 2 * width * inner,
    )


def _distilbert_shape(model: DistilBertModel, positions: int, vocab_size: int, sequence_length: int) -> _Shape:
    width, inner = model.dim, model.hidden_dim
    return _Shape(
        width=width,
        layers=model.n_layers,
        heads=model.n_heads,
        head_dim=width // model.n_heads,
        rows=positions,
        layer_matrices=4 * width * width + 2 * width * inner,
        layer_vectors=4 * width + 4 * width + inner + width,
        final_vectors=2 * width + 3 * width + vocab_size,
        pairs=model.n_layers * sequence_length,
        head_matrices=width * width,
        last_matrices=2 * width * inner,
    )


def _modernbert_shape(model: ModernBertModel, vocab_size: int, sequence_length: int) -> _Shape:
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    norm = (2 if model.norm_bias else 1) * width
    vectors = 2 * norm + (4 * width if model.attention_bias else 0) + (2 * inner + width if model.mlp_bias else 0)
    final = 3 * norm + (width if model.classifier_bias else 0) + (vocab_size if model.decoder_bias else 0)
    wide = -(-layers // model.global_attn_every_n_layers)
    near = min(sequence_length, 2 * (model.local_attention // 2) + 1)
    return _Shape(
        width=width,
        layers=layers,
        heads=model.num_attention_heads,
        head_dim=width // model.num_attention_heads,
        rows=0,
        layer_matrices=4 * width * width + 3 * width * inner,
        layer_vectors=vectors,
        final_vectors=final - norm,  # the first layer has no norm before its attention
        pairs=wide * sequence_length + (layers - wide) * near,
        head_matrices=width * width,
        last_matrices=3 * width * inner,
    )


def _t5_layers(model: T5Model) -> tuple[int, int, int]:
    """Weights of one attention and of one feed-forward layer that multiply a token, and layers of the decoder."""
    inner = model.num_heads * (model.d_kv or model.d_model // model.num_heads)
    gated = 3 if model.feed_forward_proj.startswith("gated") else 2
    return 4 * model.d_model * inner, gated * model.d_model * model.d_ff, model.num_decoder_layers or model.num_layers


def _t5_parameters(model: T5Model, vocab_size: int) -> Parameters:
    attention, feed, decoders = _t5_layers(model)
    encoders, width = model.num_layers, model.d_model
    biases = encoders + decoders if model.kind == "umt5" else 2  # umt5 has one for every layer
    body = encoders * (attention + feed + 2 * width) + decoders * (2 * attention + feed + 3 * width) + 2 * width
    body += biases * model.relative_attention_num_buckets * model.num_heads
    return Parameters(embedding=vocab_size * width, head=0, body=body)


def _t5_flops(model: T5Model, vocab_size: int, sequence_length: int, target_ratio: float) -> int:
    attention, feed, decoders = _t5_layers(model)
    # Across, keys and values are made from the encoder's tokens, queries and outputs from the decoder's.
    read = model.num_layers * (attention + feed) + decoders * attention // 2
    written = decoders * (attention + attention // 2 + feed) + vocab_size * model.d_model
    within = model.num_layers * sequence_length
    across = decoders * sequence_length * target_ratio * (1 + target_ratio / 2)
    inner = model.num_heads * (model.d_kv or model.d_model // model.num_heads)
    return round(6 * (read + target_ratio * written) + 12 * inner * (within + across))
