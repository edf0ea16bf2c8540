"""Document attention for every stock architecture: one function, no model code.

Owns the attention function that `model.build` registers with transformers under the name "document". What a query may
see travels as keyword arguments through the model's forward (`document_kwargs`), never as an `attention_mask`, because
several architectures rewrite that. Imports no transformers, so that loader workers need not.

Shapes: B sequences, H heads, G key/value heads, T tokens, S tokens of an encoder, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmssl.model import kernels, native
from lmssl.model.products import products_attention
from lmssl.model.varlen import can_attend, varlen_attention

LOOP_FROM_TOKENS = 1024
"""From this length on documents are looped over on CPU, in float32; see `loop_from_tokens`."""
WINDOW_QUERIES = 256
"""Queries of a windowed document that meet their keys at once; fewer do less work in vain, in more calls."""


def document_kwargs(
    segments_BT: Tensor,
    *,
    causal: bool,
    documents: bool,
    key_segments_BS: Tensor | None = None,
    starts_K: Tensor | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a model's forward that say what each token may attend to.

    Args:
        segments_BT: integers; equal numbers are one document, 0 is padding (which sees only itself).
        causal: tokens see earlier tokens only.
        documents: tokens see their own document only; otherwise the whole sequence, without its padding where later
            tokens are seen.
        key_segments_BS: for a decoder with cross attention, the segments of the encoder's S tokens, numbered alike.
        starts_K: `varlen.document_starts` of the segments, on their device; None: its kernels are not to be used.
    """
    if not documents and (key_segments_BS is not None or not causal):
        segments_BT = (segments_BT != 0).to(segments_BT.dtype)
        key_segments_BS = None if key_segments_BS is None else (key_segments_BS != 0).to(key_segments_BS.dtype)
    cross: dict[str, Any] = {}
    if key_segments_BS is not None:
        cross = {"document_cross_mask": _cross_mask(segments_BT, key_segments_BS)}
    if not documents and causal:
        return {"document_mask": None, "document_segments": None, "document_causal": True, **cross}
    length = segments_BT.shape[1]
    if documents and starts_K is not None and torch.is_autocast_enabled(segments_BT.device.type):
        found = {"document_mask": None, "document_segments": segments_BT, "document_causal": causal}
        return {**found, "document_starts": starts_K, **cross}
    if segments_BT.device.type == "cpu" and (native.applies() or length >= loop_from_tokens()):
        return {"document_mask": None, "document_segments": segments_BT, "document_causal": causal, **cross}
    mask = _document_mask(segments_BT, causal)
    return {"document_mask": mask, "document_segments": None, "document_causal": causal, **cross}


def loop_from_tokens() -> int:
    """From which length on documents are looped over on CPU, as `benchmarks/bench_attention.py` measures it.

    Under autocast AMX makes products quicker: they win at 1,024 tokens, the loop at 2,048, both by 12 to 42 %.
    """
    return LOOP_FROM_TOKENS * 3 // 2 if torch.is_autocast_enabled("cpu") else LOOP_FROM_TOKENS


def _document_mask(segments_BT: Tensor, causal: bool) -> Tensor:
    """[B, 1, T, T]; true where a query sees a key."""
    mask_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if causal:
        mask_BTT = mask_BTT & _causal_TT(segments_BT.shape[1], segments_BT.device)
    return mask_BTT[:, None]


def _cross_mask(segments_BT: Tensor, key_segments_BS: Tensor) -> Tensor:
    """[B, 1, T, S]; a query whose document has no keys sees all, because a softmax over nothing is not a number."""
    mask_BTS = segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return (mask_BTS | ~mask_BTS.any(-1, keepdim=True))[:, None]


def _causal_TT(length: int, device: torch.device) -> Tensor:
    index_T = torch.arange(length, device=device)
    return index_T[:, None] >= index_T[None, :]


def document_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    document_mask: Tensor | None = None,
    document_segments: Tensor | None = None,
    document_causal: bool | None = None,
    document_cross_mask: Tensor | None = None,
    document_starts: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within documents; the signature is transformers' own.

    Args:
        sliding_window: tokens further apart than `sliding_window - 1` do not see each other.
        position_bias: [1, H, T, T], added to the scores, of T5's family.
        document_mask: with the others named so, as `document_kwargs` makes them.
    Source: torch's scaled_dot_product_attention; differs in taking the block structure from segments.
    """
    length, dropout_p = query_BHTD.shape[2], dropout if module.training else 0.0
    scale = scaling if scaling is not None else query_BHTD.shape[-1] ** -0.5
    if document_cross_mask is not None and _is_cross(module):  # T5's position bias is zero here
        document_mask, document_segments, document_causal = document_cross_mask, None, False
        document_starts = position_bias = None
    window = sliding_window if sliding_window and sliding_window < length else 0
    on_cpu, causal = query_BHTD.device.type == "cpu", document_causal
    if position_bias is None and not dropout_p:
        seen = _Seen(document_segments, document_starts, document_mask is None and bool(causal), bool(causal), window)
        found = _without_mask(query_BHTD, key_BGTD, value_BGTD, seen, scale)
        if found is not None:
            return found, None
    key_BGTD, value_BGTD = (_for_heads(x_BGTD, query_BHTD.shape[1]) for x_BGTD in (key_BGTD, value_BGTD))
    mask = document_mask
    if causal is None:  # a stock forward without document_kwargs: generation, or a caller of our own probe
        causal = bool(getattr(module, "is_causal", True)) and length > 1
    if document_segments is not None:
        mask = _document_mask(document_segments, causal)
    if window:
        mask = _windowed(mask, causal, length, window, query_BHTD.device)
    if mask is not None and on_cpu and torch.compiler.is_compiling() and not dropout_p:
        qkv = _in_one_type(query_BHTD, key_BGTD, value_BGTD)
        out_BHTD = products_attention(*qkv, mask, causal=causal, scale=scale, position_bias=position_bias)
        return out_BHTD.transpose(1, 2), None
    if position_bias is not None:
        mask, causal = _biased(mask, causal, position_bias), False
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD, key_BGTD, value_BGTD, mask, dropout_p, is_causal=causal and mask is None, scale=scaling
    )
    return out_BHTD.transpose(1, 2), None


class _Seen(NamedTuple):
    """What a query may see, where it is no mask."""

    segments: Tensor | None
    starts: Tensor | None
    whole: bool
    """Causal, without documents unless there are segments."""
    causal: bool
    window: int


def _without_mask(query: Tensor, key: Tensor, value: Tensor, seen: _Seen, scale: float) -> Tensor | None:
    """Attention by kernels that know documents, [B, T, H, D]; None: none of them is for these tensors."""
    segments, starts, whole, causal, window = seen
    qkv = _in_one_type(query, key, value)
    if starts is not None and can_attend(qkv[0]):
        found: Tensor = varlen_attention(*qkv, starts, causal, scale, window)
        return found
    if (segments is not None or whole) and kernels.takes_attention(query):
        out: Tensor = kernels.attention(*qkv, segments, causal, scale, window)[0]
        return out.transpose(1, 2)
    if segments is not None and query.device.type == "cpu" and segments.shape[1] >= loop_from_tokens():
        heads = query.shape[1]
        out, _lse = _loop(qkv[0], _for_heads(qkv[1], heads), _for_heads(qkv[2], heads), segments, causal, scale, window)
        return out.transpose(1, 2)
    return None


def _for_heads(x_BGTD: Tensor, heads: int) -> Tensor:
    """Keys or values for every head, where several share them."""
    groups = x_BGTD.shape[1]
    return x_BGTD if groups == heads else x_BGTD.repeat_interleave(heads // groups, dim=1)


def _is_cross(module: nn.Module) -> bool:
    """Whether a decoder's attention looks at the encoder; UMT5 says so by its bias, T5 by its direction."""
    return not (getattr(module, "is_causal", False) or getattr(module, "has_relative_attention_bias", False))


def _in_one_type(query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does around torch's own attention, for operators that it does not know."""
    device = query_BHTD.device.type
    if not torch.is_autocast_enabled(device):
        return query_BHTD, key_BHSD, value_BHSD
    kind = torch.get_autocast_dtype(device)
    return query_BHTD.to(kind), key_BHSD.to(kind), value_BHSD.to(kind)


def _biased(mask: Tensor | None, causal: bool, position_bias: Tensor) -> Tensor:
    """The bias of the scores, with minus infinity where a mask forbids."""
    if mask is None and causal:
        mask = _causal_TT(position_bias.shape[-1], position_bias.device)
    return position_bias if mask is None else torch.where(mask, position_bias, -torch.inf)


def _windowed(mask: Tensor | None, causal: bool, length: int, window: int, device: torch.device) -> Tensor:
    """Adds transformers' sliding-window rule (a query sees `window` tokens, itself included) to a mask."""
    index_T = torch.arange(length, device=device)
    near_TT = (index_T[:, None] - index_T[None, :]).abs() < window
    if mask is None:
        mask = _causal_TT(length, device)[None, None] if causal else torch.ones_like(near_TT)[None, None]
    return mask & near_TT


@torch.library.custom_op("lmssl::document_loop", mutates_args=())
def _loop(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attention document by document on CPU; opaque to the compiler, so shapes stay static whatever the documents."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for piece in _pieces(segments, causal, window):
        asked, seen = piece.queries, piece.keys
        attended, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[asked], key[seen], value[seen], 0.0, piece.causal, attn_mask=piece.bias(query), scale=scale
        )
        out[asked] = attended
        lse[asked] = part_lse.view(1, query.shape[1], -1)
    return out, lse


@_loop.register_fake
def _loop_shapes(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)
    )


@torch.library.custom_op("lmssl::document_loop_backward", mutates_args=())
def _loop_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `document_loop`, document by document."""
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for piece in _pieces(segments, causal, window):
        asked, seen = piece.queries, piece.keys
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[asked].contiguous(),
            query[asked],
            key[seen],
            value[seen],
            out[asked],
            lse[asked],
            0.0,
            piece.causal,
            attn_mask=piece.bias(query),
            scale=scale,
        )
        for grad, part, where in zip(grads, parts, (asked, seen, seen), strict=True):
            # Keys meet several blocks of queries where there is a window.
            grad[where] = grad[where] + part if window else part
    return grads[0], grads[1], grads[2]


@_loop_backward.register_fake
def _loop_backward_shapes(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=like),
        torch.empty_like(key, memory_format=like),
        torch.empty_like(value, memory_format=like),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, output[0], output[1], segments)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, segments = ctx.saved_tensors
    grads = _loop_backward(grad_out, query, key, value, out, lse, segments, ctx.causal, ctx.scale, ctx.window)
    return (*grads, None, None, None, None)


_loop.register_autograd(_backward, setup_context=_save_for_backward)


@dataclass(frozen=True)
class _Piece:
    """Queries and keys that one call of the kernel multiplies: a document, or of a windowed one a block of queries."""

    row: int
    first_query: int
    end_query: int
    first_key: int
    end_key: int
    causal: bool
    """Left to the kernel, where there is no window."""
    window: int
    """0: none; otherwise the rule is in `bias`, with `window_causal`."""
    window_causal: bool

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return slice(self.row, self.row + 1), slice(None), slice(self.first_query, self.end_query)

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        return slice(self.row, self.row + 1), slice(None), slice(self.first_key, self.end_key)

    def bias(self, like: Tensor) -> Tensor | None:
        """What is added to the scores, [queries, keys]: minus infinity outside the window."""
        if not self.window:
            return None
        apart = torch.arange(self.first_query, self.end_query)[:, None] - torch.arange(self.first_key, self.end_key)
        near = (apart.abs() < self.window) & ((apart >= 0) | (not self.window_causal))
        return torch.zeros(near.shape, dtype=like.dtype).masked_fill_(~near, -torch.inf)


def _pieces(segments: Tensor, causal: bool, window: int) -> Iterator[_Piece]:
    for row, start, end in _documents(segments):
        if not window or end - start <= window:
            yield _Piece(row, start, end, start, end, causal, 0, causal)
            continue
        size = max(WINDOW_QUERIES, 2 * window)
        for first in range(start, end, size):
            last = min(first + size, end)
            seen = (max(start, first - window + 1), last if causal else min(end, last + window - 1))
            yield _Piece(row, first, last, *seen, False, window, causal)


def _documents(segments: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of every run of equal segment numbers; `segments` is [B, T] on CPU."""
    changes = (segments[:, 1:] != segments[:, :-1]).nonzero().tolist()
    cuts: list[list[int]] = [[0] for _ in range(segments.shape[0])]
    for row, column in changes:
        cuts[row].append(column + 1)
    length = segments.shape[1]
    return [
        (row, start, end)
        for row, starts in enumerate(cuts)
        for start, end in zip(starts, [*starts[1:], length], strict=True)
    ]
