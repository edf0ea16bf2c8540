"""Document attention by kernels for rows of many lengths, for CUDA: no mask, no work across documents.

Rows are laid end to end and cut at every document's start. The list of starts is made on the host, where the segments
are known before they are copied, so that nothing waits for the device; its length is one of few, so that compiled code
meets few shapes.

Shapes: B sequences, T tokens, H heads, G key/value heads, D head width, K starts of documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

DOCUMENT_TOKENS = (256, 64, 32, 16, 8, 4, 2, 1)
"""Room for documents: as if they had so many tokens on average. Few sizes, so that compiled code meets few shapes."""
MAX_HEAD_WIDTH = 256
"""Of the flash kernels."""

# Newer versions want to be told that heads share keys; older ones just take it.
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def document_starts(segments_BT: Tensor) -> Tensor:
    """Where documents start in the rows laid end to end, int32 [K], then their end again and again.

    K - 1 is the number of tokens / 256, / 64, / 32 and so on to / 1: the first that has room for all documents. What
    follows on the last document are documents without tokens. They cost little time, and memory: FlashAttention-2's
    backward pass holds float32 [tokens + 128 K, H, D], for documents without tokens as for others. With 131,072 tokens
    of width 768 that is 0.6 GB at / 256, 1.2 GB at / 64 and 13 GB at / 4; hence steps of 2 where K is large.

    Args:
        segments_BT: integers on CPU; equal neighbours in a row are one document, and padding is one, too.

    >>> document_starts(torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1]])).tolist()
    [0, 2, 3, 4, 8]
    """
    num_rows, length = segments_BT.shape
    first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    found = first_BT.reshape(-1).nonzero()[:, 0]
    num_tokens = num_rows * length
    room = next(num_tokens // tokens for tokens in DOCUMENT_TOKENS if num_tokens // tokens >= len(found))
    starts_K = torch.full((room + 1,), num_tokens, dtype=torch.int32)
    starts_K[: len(found)] = found
    return starts_K


def can_attend(query_BHTD: Tensor) -> bool:
    """Whether the kernels take tensors like these: 16 bits, and heads of a width they know."""
    width = query_BHTD.shape[-1]
    return query_BHTD.dtype in (torch.bfloat16, torch.float16) and width <= MAX_HEAD_WIDTH and width % 8 == 0


def varlen_attention(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    starts_K: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> Tensor:
    """Scaled dot-product attention within documents, [B, T, H, D].

    Args:
        query_BHTD: in one type of 16 bits with keys and values, which may have fewer heads.
        starts_K: of `document_starts`, on the device.
        window: tokens further apart than `window - 1` do not see each other; 0: all of a document do.
    Source: torch's `varlen_attn` (FlashAttention-2, Dao 2023); differs in its list of documents of fixed length.
    """
    batch, heads, length, width = query_BHTD.shape
    query, key, value = (
        x.transpose(1, 2).reshape(batch * length, -1, width) for x in (query_BHTD, key_BGTD, value_BGTD)
    )
    back = window - 1 if window else -1
    near = (back, 0 if causal else back)
    more = _SHARED_KEYS if heads != key_BGTD.shape[1] else {}
    out: Any = varlen_attn(query, key, value, starts_K, starts_K, length, length, scale=scale, window_size=near, **more)
    out_NHD: Tensor = out  # and nothing else, unless it is asked for
    return out_NHD.reshape(batch, length, heads, width)
