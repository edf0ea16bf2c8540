"""Attention as plain matrix products over blocks of queries, compiled, for CPU.

Torch's CPU attention kernel runs its backward at a tenth of the speed of the matrix products in it. Written out, the
products go to the BLAS and the compiler fuses the rest. A block of queries meets only the keys a causal mask lets it
see, so that 4 blocks do 5/8 of the work.

Forward and backward are operators that the model's own graph does not look into, and are compiled once each for all
layers; as parts of that graph they would be compiled once per layer.

Shapes: B sequences, H heads, T queries, S keys (as many as queries if causal), D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK_QUERIES = 128
BLOCKS = 4
"""Blocks of queries at most; more save little work and make the compiler's graph longer."""


def products_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    mask: Tensor,
    *,
    causal: bool,
    scale: float,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention, [B, H, T, D].

    Args:
        query_BHTD: in one type with keys and values; scores are rounded to it, as in transformers' eager attention,
            the softmax is float32.
        mask: bool, [B, 1, T, S], B perhaps 1; every query sees at least one key.
        causal: no query sees a later key; lets the work on later keys be left out.
        scale: factor of the scores.
        position_bias: [1, H, T, S], added to the scores, of T5's family; it has a gradient.
    Source: the recomputation of FlashAttention (Dao et al. 2022), with query blocks as the only tiles.
    """
    zero = torch.zeros((), dtype=torch.bfloat16, device=mask.device)
    bias = torch.where(mask, zero, -torch.inf)  # added, because choosing costs 4 times as much per score
    inputs = (x_BHTD.contiguous() for x_BHTD in (query_BHTD, key_BHSD, value_BHSD))
    position_bias = None if position_bias is None else position_bias.contiguous()
    out_BHTD: Tensor = _attend(*inputs, bias, position_bias, causal, scale)[0]
    return out_BHTD


@torch.library.custom_op("lmssl::products_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, position: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and the log of each query's sum of exponentials."""
    found: tuple[Tensor, Tensor] = _compiled(_forward, query, key, value, bias, position, causal, scale)
    return found


@_attend.register_fake
def _attend_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, position: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    return torch.empty_like(query), query.new_empty((batch, heads, length, 1), dtype=torch.float32)


@torch.library.custom_op("lmssl::products_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `products_attention` with respect to query, key, value and position bias, empty if there is none."""
    arguments = (grad_out, query, key, value, bias, position, out, lse, causal, scale)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _compiled(_backward, *arguments)
    return found


@_gradients.register_fake
def _gradients_shapes(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_position = query.new_empty(0) if position is None else position.new_empty(position.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_position


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, position, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, bias, position, output[0], output[1])


def _autograd(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    of_query, of_key, of_value, of_position = _gradients(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.scale
    )
    return of_query, of_key, of_value, None, of_position if of_position.numel() else None, None, None


_attend.register_autograd(_autograd, setup_context=_save_for_backward)


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys) of every block."""
    if not causal:
        return [(0, queries, keys)]
    size = max(MIN_BLOCK_QUERIES, -(-queries // BLOCKS))
    ends = [(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [(start, end, end) for start, end in ends]


def _biased(scores: Tensor, place: tuple[slice, ...], *biases: Tensor | None) -> Tensor:
    for bias in biases:
        scores = scores if bias is None else scores + bias[place]
    return scores


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, position: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for start, end, seen in _blocks(query.shape[2], key.shape[2], causal):
        place = (slice(None), slice(None), slice(start, end), slice(seen))
        scores = (query[:, :, start:end] @ key[:, :, :seen].transpose(2, 3)).float() * scale
        scores = _biased(scores, place, bias, position)
        top = scores.amax(-1, keepdim=True)
        powers = torch.exp(scores - top)
        total = powers.sum(-1, keepdim=True)
        outs.append((powers / total).to(value.dtype) @ value[:, :, :seen])
        lses.append(top + torch.log(total))
    return torch.cat(outs, 2).contiguous(), torch.cat(lses, 2).contiguous()


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
    blocks = _blocks(query.shape[2], key.shape[2], causal)
    key_blocks = [(first, last) for first, last, _ in blocks] if causal else [(0, key.shape[2])]
    grad_query: list[Tensor] = []
    grad_key: dict[int, Tensor] = {}
    grad_value: dict[int, Tensor] = {}
    grad_position: list[Tensor] = []
    for start, end, seen in blocks:
        rows = (slice(None), slice(None), slice(start, end))
        # Copied once: torch's products copy parts of a matrix for themselves, each time anew and more slowly.
        q, g = query[rows].contiguous(), grad_out[rows].contiguous()
        k, v = key[:, :, :seen].contiguous(), value[:, :, :seen].contiguous()
        scores = (q @ k.transpose(2, 3)).float() * scale
        probs = torch.exp(_biased(scores, (*rows, slice(seen)), bias, position) - lse[rows])
        grad_probs = (g @ v.transpose(2, 3)).float()
        grad_biased = probs * (grad_probs - delta[rows])
        if position is not None:  # one for all sequences
            grad_position.append(F.pad(grad_biased.sum(0, keepdim=True), (0, key.shape[2] - seen)))
        grad_scores = (grad_biased * scale).to(query.dtype)
        grad_query.append(grad_scores @ k)
        of_key = (grad_scores.transpose(2, 3) @ q).float()
        of_value = (probs.to(value.dtype).transpose(2, 3) @ g).float()
        for first, last in key_blocks:
            if last <= seen:
                grad_key[first] = grad_key.get(first, 0) + of_key[:, :, first:last]
                grad_value[first] = grad_value.get(first, 0) + of_value[:, :, first:last]
    grads = (
        torch.cat(grad_query, 2),
        torch.cat(list(grad_key.values()), 2).to(key.dtype),
        torch.cat(list(grad_value.values()), 2).to(value.dtype),
    )
    of_query, of_key, of_value = (x.contiguous() for x in grads)
    of_position = query.new_empty(0) if position is None else torch.cat(grad_position, 2).to(position.dtype)
    return of_query, of_key, of_value, of_position


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call: asking for the compiler imports it, which takes seconds."""
    return torch.compile(function, dynamic=False)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    # Detached, because the compiler reads `.grad` of what it is given, and warns where that is no leaf.
    return _compile(function)(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
