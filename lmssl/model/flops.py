"""Parameters, training FLOPs and memory of the shipped families, by closed formulas; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lmssl.errors import ModelError
from lmssl.recipe.model import Gpt2Model, LlamaModel, ModelBase, Qwen3Model, null_sizes


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, by what they do."""

    embedding: int
    """Rows looked up: tokens, and positions in gpt2."""
    head: int
    """The output matrix when it is one of its own; 0 when it is the embedding's."""
    body: int
    """Everything between."""

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
    width: int
    layers: int
    heads: int
    head_dim: int
    positions: int
    """Rows of a learned position embedding; 0 without one."""
    layer_matrices: int
    """Weights of one layer that multiply a token."""
    layer_vectors: int
    """Norms and biases of one layer."""
    final_vectors: int


def has_formula(model: ModelBase) -> bool:
    """Whether this family is known here; of others only the built model can be counted."""
    return isinstance(model, LlamaModel | Qwen3Model | Gpt2Model)


def num_parameters(model: ModelBase, *, vocab_size: int, sequence_length: int) -> Parameters:
    """Parameters of a `model` section.

    Args:
        vocab_size: rows of the embedding.
        sequence_length: tokens; the number of positions where the section does not say.
    Raises:
        ModelError: the family is not a shipped one.

    >>> gpt2 = Gpt2Model(kind="gpt2", n_embd=64, n_layer=2, n_head=4)
    >>> num_parameters(gpt2, vocab_size=1000, sequence_length=128)
    Parameters(embedding=72192, head=0, body=100096)
    """
    shape = _shape(model, sequence_length)
    matrix = vocab_size * shape.width
    return Parameters(
        embedding=matrix + shape.positions * shape.width,
        head=0 if model.tie_word_embeddings else matrix,
        body=shape.layers * (shape.layer_matrices + shape.layer_vectors) + shape.final_vectors,
    )


def flops_per_token(model: ModelBase, *, vocab_size: int, sequence_length: int) -> int:
    """Floating-point operations of one training step per token, forward and backward.

    `6 * (layers * matrices + vocab_size * width) + 6 * layers * heads * head_dim * sequence_length`

    A weight that multiplies a token costs a multiplication and an addition forward and twice that backward. The head
    counts, shared or not; looking up an embedding, norms and biases do not. Attention multiplies queries with keys and
    weights with values: 12 * heads * head_dim per layer and pair of tokens with the backward pass, and half of all
    pairs are causal. Documents packed together attend to fewer pairs still, which is not counted here.

    Raises:
        ModelError: the family is not a shipped one.
    Source: Kaplan et al. 2020, appendix C, and PaLM (Chowdhery et al. 2022), appendix B; differs: causal pairs only.
    """
    shape = _shape(model, sequence_length)
    weights = shape.layers * shape.layer_matrices + vocab_size * shape.width
    attention = shape.layers * shape.heads * shape.head_dim * sequence_length
    return 6 * weights + 6 * attention


def training_memory(num_parameters: int) -> TrainingMemory:
    """Bytes of fp32 weights, gradients and AdamW's two moments.

    >>> training_memory(125_000_000).total
    2000000000
    """
    return TrainingMemory(4 * num_parameters, 4 * num_parameters, 8 * num_parameters)


def _shape(model: ModelBase, sequence_length: int) -> _Shape:
    sizes = null_sizes(model, sequence_length)
    if isinstance(model, LlamaModel | Qwen3Model):
        return _rotary_shape(model, sizes)
    if isinstance(model, Gpt2Model):
        width, inner = model.n_embd, model.n_inner or sizes["n_inner"]
        return _Shape(
            width=width,
            layers=model.n_layer,
            heads=model.n_head,
            head_dim=width // model.n_head,
            positions=model.n_positions or sizes["n_positions"],
            layer_matrices=4 * width * width + 2 * width * inner,
            # Two norms with scale and shift; biases of qkv, attention output, and the two of the mlp.
            layer_vectors=4 * width + 4 * width + inner + width,
            final_vectors=2 * width,
        )
    raise ModelError(
        f"there is no formula for the size of kind {getattr(model, 'kind', '?')}",
        where="model.kind",
        remedy="count the built model: `lmssl show RECIPE --model`",
    )


def _rotary_shape(model: LlamaModel | Qwen3Model, sizes: dict[str, int]) -> _Shape:
    width, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    head_dim = model.head_dim or sizes["head_dim"]
    groups = model.num_key_value_heads or sizes["num_key_value_heads"]
    queries, keys = heads * head_dim, groups * head_dim
    vectors = 2 * width
    if model.attention_bias:
        vectors += queries + 2 * keys + width
    if isinstance(model, LlamaModel) and model.mlp_bias:
        vectors += 2 * inner + width
    if isinstance(model, Qwen3Model):
        vectors += 2 * head_dim  # the norms of queries and keys
    return _Shape(
        width=width,
        layers=model.num_hidden_layers,
        heads=heads,
        head_dim=head_dim,
        positions=0,
        layer_matrices=2 * width * queries + 2 * width * keys + 3 * width * inner,
        layer_vectors=vectors,
        final_vectors=width,
    )
