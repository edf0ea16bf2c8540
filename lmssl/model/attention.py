"""Document attention for every stock architecture: one function, no model code.

Owns the attention function that `model.build` registers with transformers under the name "document". What a query may
see travels as keyword arguments through the model's forward (`document_kwargs`), never as an `attention_mask`, because
several architectures rewrite that. Imports no transformers, so that loader workers need not.

Shapes: B sequences, H heads, G key/value heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmssl.model.products import products_attention

LOOP_FROM_TOKENS = 1536
"""From this length on documents are looped over on CPU; between 512 and 2,048, the crossing itself is not measured."""


def document_kwargs(segments_BT: Tensor, *, causal: bool, documents: bool) -> dict[str, Any]:
    """Keyword arguments for a model's forward that say what each token may attend to.

    Args:
        segments_BT: integers; equal numbers are one document, 0 is padding (which sees only itself).
        causal: tokens see earlier tokens only.
        documents: tokens see their own document only; otherwise the whole sequence.
    """
    if not documents:
        return {"document_mask": None, "document_segments": None, "document_causal": causal}
    length = segments_BT.shape[1]
    if segments_BT.device.type == "cpu" and length >= LOOP_FROM_TOKENS:
        return {"document_mask": None, "document_segments": segments_BT, "document_causal": causal}
    mask_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if causal:
        mask_BTT = mask_BTT & _causal_TT(length, segments_BT.device)
    return {"document_mask": mask_BTT[:, None], "document_segments": None, "document_causal": causal}


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
    document_mask: Tensor | None = None,
    document_segments: Tensor | None = None,
    document_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within documents; the signature is transformers' own.

    Source: torch's scaled_dot_product_attention; differs in taking the block structure from segments.
    """
    heads, groups = query_BHTD.shape[1], key_BGTD.shape[1]
    if heads != groups:
        key_BGTD = key_BGTD.repeat_interleave(heads // groups, dim=1)
        value_BGTD = value_BGTD.repeat_interleave(heads // groups, dim=1)
    length = query_BHTD.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    if document_segments is not None and not windowed and not (dropout and module.training):
        scale = scaling if scaling is not None else query_BHTD.shape[-1] ** -0.5
        out_BHTD, _lse = _loop(query_BHTD, key_BGTD, value_BGTD, document_segments, bool(document_causal), scale)
        return out_BHTD.transpose(1, 2), None
    mask, causal = document_mask, document_causal
    if causal is None:  # a stock forward without document_kwargs: generation, or a caller of our own probe
        causal = bool(getattr(module, "is_causal", True)) and length > 1
    if document_segments is not None:
        mask = (document_segments[:, :, None] == document_segments[:, None, :])[:, None]
        mask = mask & _causal_TT(length, mask.device) if causal else mask
    if windowed:
        assert sliding_window is not None
        mask = _windowed(mask, causal, length, sliding_window, query_BHTD.device)
    if mask is not None and query_BHTD.device.type == "cpu" and torch.compiler.is_compiling() and not dropout:
        if torch.is_autocast_enabled("cpu"):  # as it does around torch's own attention
            kind = torch.get_autocast_dtype("cpu")
            query_BHTD, key_BGTD, value_BGTD = (x.to(kind) for x in (query_BHTD, key_BGTD, value_BGTD))
        scale = scaling if scaling is not None else query_BHTD.shape[-1] ** -0.5
        out_BHTD = products_attention(query_BHTD, key_BGTD, value_BGTD, mask, causal=causal, scale=scale)
        return out_BHTD.transpose(1, 2), None
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BGTD,
        value_BGTD,
        attn_mask=mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=causal and mask is None,
        scale=scaling,
    )
    return out_BHTD.transpose(1, 2), None


def _windowed(mask: Tensor | None, causal: bool, length: int, window: int, device: torch.device) -> Tensor:
    """Adds transformers' sliding-window rule (a query sees `window` tokens, itself included) to a mask."""
    index_T = torch.arange(length, device=device)
    near_TT = (index_T[:, None] - index_T[None, :]).abs() < window
    if mask is None:
        mask = _causal_TT(length, device) if causal else torch.ones_like(near_TT)
    return mask & near_TT


@torch.library.custom_op("lmssl::document_loop", mutates_args=())
def _loop(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention document by document on CPU; opaque to the compiler, so shapes stay static whatever the documents."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for row, start, end in _documents(segments):
        part = (slice(row, row + 1), slice(None), slice(start, end))
        attended, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[part], key[part], value[part], 0.0, causal, scale=scale
        )
        out[part] = attended
        lse[part] = part_lse.view(1, query.shape[1], end - start)
    return out, lse


@_loop.register_fake
def _loop_shapes(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, causal: bool, scale: float
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `document_loop`, document by document."""
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for row, start, end in _documents(segments):
        part = (slice(row, row + 1), slice(None), slice(start, end))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[part].contiguous(),
            query[part],
            key[part],
            value[part],
            out[part],
            lse[part],
            0.0,
            causal,
            scale=scale,
        )
        for grad, piece in zip(grads, parts, strict=True):
            grad[part] = piece
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
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=like),
        torch.empty_like(key, memory_format=like),
        torch.empty_like(value, memory_format=like),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[0], output[1], segments)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, segments = ctx.saved_tensors
    grads = _loop_backward(grad_out, query, key, value, out, lse, segments, ctx.causal, ctx.scale)
    return (*grads, None, None, None)


_loop.register_autograd(_backward, setup_context=_save_for_backward)


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
