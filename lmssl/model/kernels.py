"""Attention and the head's softmax as operators, by kernels of our own on x86 CPUs.

Torch's own kernels and what its compiler writes read and write memory many times for what fits into a cache. These
take the place of `products_attention`, of the loop over documents and of the head's loops in training steps, in
float32 or under bf16 autocast; those of `pointwise.py` of what the compiler writes for activations, norms and
embeddings, that of `linear.py` of the product which is a weight's gradient.

Shapes: B sequences, H heads, G key/value heads, T tokens, D head width, N targets, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmssl.model.native import applies, integers, kernel, pointer, takes, threads


def takes_attention(query_BHTD: Tensor) -> bool:
    """Whether `attention` is there for queries of this shape and type."""
    return query_BHTD.shape[-1] % 32 == 0 and applies() and takes(query_BHTD)


@torch.library.custom_op("lmssl::native_attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attention within documents, [B, H, T, D] laid out as [B, T, H, D], and the log of each query's sum, [B, H, T].

    Args:
        query, key, value: [B, H, T, D], and twice [B, G, T, D], float32 or bfloat16, D a multiple of 32, in any layout.
        segments: integers [B, T], equal neighbours are one document; None: a sequence is one.
        causal: no query sees a later key.
        scale: of the scores.
        window: tokens further apart than `window - 1` do not see each other; 0: no such limit.
    Source: FlashAttention (Dao et al. 2022); differs in skipping tiles by the documents of a sequence.
    """
    query, key, value = (_by_width(x) for x in (query, key, value))
    out, lse = _inside_tokens(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    _attend(_Case(causal, scale, window), segments, (None, None, None), (query, key, value, out), lse)
    return out, lse


@attention.register_fake
def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return _inside_tokens(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("lmssl::native_attention_backward", mutates_args=())
def _attention_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value, laid out as [B, T, heads, D]."""
    grad, query, key, value, out = (_by_width(x) for x in (grad, query, key, value, out))
    found = _inside_tokens(query), _inside_tokens(key), _inside_tokens(value)
    case = _Case(causal, scale, window)
    _attend(case, segments, (None, None, None), (query, key, value, out, grad, *found), lse.contiguous())
    return found


@_attention_gradients.register_fake
def _gradients_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _inside_tokens(query), _inside_tokens(key), _inside_tokens(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, segments)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    found = _attention_gradients(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.window)
    return (*found, None, None, None, None)


attention.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("lmssl::joined_attention", mutates_args=())
def joined_attention(
    product: Tensor,
    bias: Tensor | None,
    heads: int,
    width: int,
    cos: Tensor | None,
    sin: Tensor | None,
    segments: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention` of queries, keys and values that are one product, [B, T, H * D], and [B, H, T].

    Args:
        product: [B, T, (H + 2 G) * D], float32 or bfloat16: queries of all heads, then keys, then values.
        bias: [(H + 2 G) * D], float32, added to it; None: nothing.
        heads, width: H and D.
        cos, sin: [B or 1, T, D], float32, of rotary positions; None: queries and keys are not rotated.
    Source: the rotation is transformers' `apply_rotary_pos_emb`, in float32.
    """
    product = product.contiguous()
    batch, length = product.shape[:2]
    out = product.new_empty(batch, length, heads * width)
    lse = product.new_empty((batch, heads, length), dtype=torch.float32)
    tensors = (*_parts(product, heads, width), out.view(batch, length, heads, width).transpose(1, 2))
    _attend(_Case(causal, scale, 0), segments, (cos, sin, bias), tensors, lse)
    return out, lse


@joined_attention.register_fake
def _joined_shapes(product: Tensor, bias: Tensor | None, heads: int, width: int, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length = product.shape[:2]
    lse = product.new_empty((batch, heads, length), dtype=torch.float32)
    return product.new_empty(batch, length, heads * width), lse


@torch.library.custom_op("lmssl::joined_attention_backward", mutates_args=())
def _joined_gradient(
    grad: Tensor,
    product: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    segments: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the product, and of the bias by sequences, [B, (H + 2 G) * D] or [0]."""
    product, heads = product.contiguous(), lse.shape[1]
    batch, length = product.shape[:2]
    width = out.shape[-1] // heads
    found, of_bias = torch.empty_like(product), _by_sequences(product, bias)
    whole = (x.contiguous().view(batch, length, heads, width).transpose(1, 2) for x in (out, grad))
    tensors = (*_parts(product, heads, width), *whole, *_parts(found, heads, width))
    _attend(_Case(causal, scale, 0), segments, (cos, sin, bias), tensors, lse.contiguous(), of_bias)
    return found, of_bias


@_joined_gradient.register_fake
def _joined_gradient_shape(grad: Tensor, product: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(product, memory_format=torch.contiguous_format), _by_sequences(product, bias)


def _by_sequences(product: Tensor, bias: Tensor | None) -> Tensor:
    shape = (0,) if bias is None else (product.shape[0], product.shape[2])
    return product.new_empty(shape, dtype=torch.float32)


def _save_joined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    product, bias, _, _, cos, sin, segments, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(product, bias, *output, cos, sin, segments)


def _joined_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    of_product, of_bias = _joined_gradient(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (of_product, of_bias.sum(0) if ctx.needs_input_grad[1] else None, *(None,) * 7)


joined_attention.register_autograd(_joined_backward, setup_context=_save_joined)


class _Case(NamedTuple):
    causal: bool
    scale: float
    window: int


def _attend(
    case: _Case,
    segments: Tensor | None,
    prepared: tuple[Tensor | None, Tensor | None, Tensor | None],
    tensors: Sequence[Tensor],
    lse: Tensor,
    of_bias: Tensor | None = None,
) -> None:
    """Attention of query, key and value into out, or, with out and its gradient given, into their gradients.

    Args:
        prepared: cos, sin and bias of queries and keys, and of values the bias.
        of_bias: room for its gradients; empty or None: there is none.
    """
    (batch, heads, length, width), groups = tensors[0].shape, tensors[1].shape[1]
    cos, sin, bias = (None if x is None else x.float().contiguous() for x in prepared)
    stride = 0 if cos is None or cos.shape[0] == 1 else length * width
    sizes = integers(batch, heads, groups, length, width, case.window, int(case.causal), stride)
    segments = None if segments is None else segments.to(torch.int64).contiguous()
    strides = integers(*(x.stride(dim) for x in tensors for dim in (0, 2, 1)))  # of sequence, token and head
    backward = len(tensors) > 4
    inputs, outputs = (tensors[:5], tensors[5:]) if backward else (tensors[:4], ())
    places = [pointer(x) for x in (*inputs, lse, *outputs)]
    if backward:
        places.append(pointer(None if bias is None else of_bias))
    pointers = (pointer(x) for x in (segments, cos, sin, bias))
    kernel("lmssl_attention_backward" if backward else "lmssl_attention", tensors[0].dtype)(
        sizes, ctypes.c_float(case.scale), *pointers, strides, *places, threads()
    )


def _parts(product: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, T, D] in one product [B, T, (H + 2 G) * D]."""
    batch, length, size = product.shape
    groups = (size // width - heads) // 2
    every = product.view(batch, length, -1, width).transpose(1, 2)
    return every[:, :heads], every[:, heads : heads + groups], every[:, heads + groups :]


@torch.library.custom_op("lmssl::head_gradient", mutates_args={"logits_NV"})
def head_gradient(logits_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies in nats, and 1.0 where the target is the largest logit alone, [N] each, float32.

    The gradient of the sum takes the place of the logits. A negative target has neither loss nor gradient.

    Args:
        logits_NV: bfloat16, by rows.
        bias_V: float32, added to them; None: nothing.
    Raises:
        IndexError: a target that the vocabulary does not have.
    """
    rows, vocabulary = logits_NV.shape
    if int(targets_N.max()) >= vocabulary:
        raise IndexError(f"target {int(targets_N.max())} is beyond a vocabulary of {vocabulary}")
    losses, correct = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    bias_V = None if bias_V is None else bias_V.float().contiguous()
    targets_N = targets_N.to(torch.int64).contiguous()
    sizes = ctypes.c_int64(rows), ctypes.c_int64(vocabulary)
    first, last = map(pointer, (logits_NV, bias_V, targets_N)), map(pointer, (losses, correct))
    kernel("lmssl_head", logits_NV.dtype)(*first, *sizes, *last, threads())
    return losses, correct


@head_gradient.register_fake
def _head_shapes(logits_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    losses, correct = (logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(2))
    return losses, correct


@torch.library.custom_op("lmssl::scaled_gradient", mutates_args=())
def scaled_gradient(product_DV: Tensor, factor: Tensor, width: int) -> Tensor:
    """`factor * product[:width].T` in float32, [V, D], laid out by words.

    Args:
        product_DV: float32 or bfloat16, by rows; width and vocabulary are multiples of 16.
        factor: one number, float32.
    """
    return turned_and_scaled(product_DV, factor, width)


def turned_and_scaled(product_DV: Tensor, factor: Tensor, width: int) -> Tensor:
    """`scaled_gradient`, for operators that go on with it."""
    vocabulary = product_DV.shape[1]
    out = product_DV.new_empty((vocabulary, width), dtype=torch.float32)
    sizes = ctypes.c_int64(width), ctypes.c_int64(vocabulary)
    product_DV, factor = product_DV.contiguous(), factor.float()
    kernel("lmssl_turn", product_DV.dtype)(pointer(product_DV), pointer(factor), *sizes, pointer(out), threads())
    return out


@scaled_gradient.register_fake
def _scaled_shape(product_DV: Tensor, factor: Tensor, width: int) -> Tensor:
    return product_DV.new_empty((product_DV.shape[1], width), dtype=torch.float32)


def _by_width(x_BHTD: Tensor) -> Tensor:
    """With the numbers of a head next to each other, as the kernels read them, two at a time."""
    return x_BHTD if x_BHTD.stride(3) == 1 and x_BHTD.stride(2) % 2 == 0 else x_BHTD.contiguous()


def _inside_tokens(like_BHTD: Tensor) -> Tensor:
    """An empty [B, H, T, D] whose heads lie inside tokens, where the next layer wants them."""
    batch, heads, length, width = like_BHTD.shape
    return like_BHTD.new_empty((batch, length, heads, width)).transpose(1, 2)
