"""The loss at targets, without the `tokens x vocabulary` matrix.

Logits of a chunk of targets live only while that chunk's loss and gradients are taken. The gradient is computed in
the forward pass and scaled in the backward pass, so the head costs three matrix products, as an ordinary head does,
and not the four of a recomputed one.

Shapes: N targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmssl.errors import ModelError

IGNORE = -100
"""Target of a position that predicts nothing, as in torch and transformers."""


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk_targets: int) -> Tensor:
    """Sum of cross-entropies in nats over targets that are not `IGNORE`, a float32 scalar.

    Args:
        hidden_ND: hidden states, in the type of the matrix products.
        weight_VD: output embedding; its gradient is accumulated in float32.
        targets_N: int64, in [0, V) or `IGNORE`.
        chunk_targets: targets whose logits exist at once.
    Source: the fused linear cross-entropy of Liger-Kernel (Hsu et al. 2024); differs in being plain torch, so that
    the compiler fuses it on any device, and in keeping the weight's gradient in float32.
    """
    if not (torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)):
        return _forward_only(hidden_ND, weight_VD, None, targets_N, chunk_targets)[0]
    loss: Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_targets)  # type: ignore[no-untyped-call]
    return loss


def loss_and_correct(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, chunk_targets: int
) -> tuple[Tensor, Tensor]:
    """`summed_cross_entropy` of a head that may have a bias, and how many targets it predicts, two float32 scalars.

    A target is predicted if its logit is the largest and no other equals it: scoring ties as correct would make a model
    of equal logits perfect.

    Args:
        bias_V: added to the logits in float32; None where the head has none.
    """
    parameters = (hidden_ND, weight_VD) if bias_V is None else (hidden_ND, weight_VD, bias_V)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in parameters)):
        return _forward_only(hidden_ND, weight_VD, bias_V, targets_N, chunk_targets)
    found: tuple[Tensor, Tensor] = _LossAndCorrect.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, chunk_targets
    )
    return found


def _forward_only(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_targets: int
) -> tuple[Tensor, Tensor]:
    weight = weight_VD.to(hidden_ND.dtype)
    total, correct = (hidden_ND.new_zeros((), dtype=torch.float32) for _ in range(2))
    for start in range(0, hidden_ND.shape[0], chunk_targets):
        part = slice(start, start + chunk_targets)
        logits_NV = _logits(hidden_ND[part], weight, bias_V)
        total = total + F.cross_entropy(logits_NV, targets_N[part], ignore_index=IGNORE, reduction="sum")
        correct = correct + _correct(logits_NV, targets_N[part])
    return total, correct


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    return logits_NV if bias_V is None else logits_NV + bias_V.float()


def _correct(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Targets that no other token reaches: a tie is no right answer, and counting ties is quicker than `argmax`."""
    kept_N = targets_N != IGNORE
    top_N1 = logits_NV.amax(-1, keepdim=True)
    alone_N = (logits_NV >= top_N1).sum(-1) == 1
    picked_N1 = logits_NV.gather(1, torch.where(kept_N, targets_N, 0)[:, None])
    return ((picked_N1 == top_N1)[:, 0] & alone_N & kept_N).sum().float()


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_targets: int) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden: list[Tensor] = []
        grad_weight_DV: Tensor | None = None
        for start in range(0, hidden_ND.shape[0], chunk_targets):
            part = slice(start, start + chunk_targets)
            kept_N1 = (targets_N[part] != IGNORE)[:, None]
            loss, grad_logits_NV = _chunk(_logits(hidden_ND[part], weight, None), targets_N[part], hidden_ND.dtype)
            total = total + loss
            # Rows that predict nothing are taken out here, where they are D wide, and not from the V wide gradient.
            grad_hidden.append((grad_logits_NV @ weight) * kept_N1)
            grad_weight_DV = _add_product(grad_weight_DV, hidden_ND[part] * kept_N1, grad_logits_NV)
        assert grad_weight_DV is not None, "no targets' places"
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight_DV.t().contiguous().to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], None, None


_FLOAT16_ROOM = 64.0
"""By which hidden states are divided before they are summed in float16; a power of two, which rounds nothing."""


class _LossAndCorrect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_targets: int
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(hidden_ND.dtype)
        total, correct = (hidden_ND.new_zeros((), dtype=torch.float32) for _ in range(2))
        grad_hidden: list[Tensor] = []
        width = hidden_ND.shape[1]
        grad_DV: Tensor | None = None
        for start in range(0, hidden_ND.shape[0], chunk_targets):
            part = slice(start, start + chunk_targets)
            kept_N1 = (targets_N[part] != IGNORE)[:, None].to(hidden_ND.dtype)
            logits_NV = _logits(hidden_ND[part], weight, bias_V)
            correct = correct + _correct(logits_NV, targets_N[part])
            loss, grad_logits_NV = _chunk(logits_NV, targets_N[part], hidden_ND.dtype)
            total = total + loss
            grad_hidden.append((grad_logits_NV @ weight) * kept_N1)
            # The bias is the weight of a hidden unit that is 1 wherever there is a target: one more row of a product.
            seen_ND = torch.cat([hidden_ND[part] * kept_N1, kept_N1], dim=1)
            grad_DV = _add_product(grad_DV, seen_ND, grad_logits_NV)
        assert grad_DV is not None, "no targets' places"
        grad_weight_VD = grad_DV[:width].t().contiguous().to(weight_VD.dtype)
        grad_bias_V = None if bias_V is None else grad_DV[width].to(bias_V.dtype)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight_VD, grad_bias_V)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        grad_bias_V = None if grad_bias_V is None else grad_bias_V * grads[0]
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], grad_bias_V, None, None


def _add_product(total_DV: Tensor | None, left_ND: Tensor, right_NV: Tensor) -> Tensor:
    """`total_DV + left_ND.T @ right_NV`, or the product alone, in float32."""
    if total_DV is None:
        return _product(left_ND, right_NV)
    found: Tensor = _plus_product(total_DV, left_ND, right_NV)
    return found


@torch.library.custom_op("lmssl::plus_product", mutates_args=())
def _plus_product(total_DV: Tensor, left_ND: Tensor, right_NV: Tensor) -> Tensor:
    """`total_DV + left_ND.T @ right_NV`; an operator that the compiler does not look into.

    It would transpose bfloat16 tiles of two matrices in one loop, and gcc 12 at -O3 makes garbage of that on CPUs with
    AVX-512 (torch 2.13; without SLP vectorisation it does not).
    """
    return total_DV + _product(left_ND, right_NV)


def _product(left_ND: Tensor, right_NV: Tensor) -> Tensor:
    """`left_ND.T @ right_NV` in float32; [D, N] @ [N, V] runs faster on CPU than the other way round, transposed."""
    if left_ND.dtype == torch.float16:  # sums over thousands of targets leave its range, and no loss scale is in them
        return ((left_ND / _FLOAT16_ROOM).t().contiguous() @ right_NV).float() * _FLOAT16_ROOM
    return (left_ND.t().contiguous() @ right_NV).float()


@_plus_product.register_fake
def _plus_product_shape(total_DV: Tensor, left_ND: Tensor, right_NV: Tensor) -> Tensor:
    return torch.empty_like(total_DV)


def _chunk(logits_NV: Tensor, targets_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of one chunk, and its gradient with respect to the logits as if every row had a target."""
    log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
    del logits_NV  # half of what a chunk takes
    kept_N = targets_N != IGNORE
    safe_N1 = torch.where(kept_N, targets_N, 0)[:, None]
    picked_N1 = log_probs_NV.gather(1, safe_N1)
    loss = -torch.where(kept_N, picked_N1[:, 0], 0.0).sum()
    if torch.compiler.is_compiling():  # one fused loop, and a scatter of one entry a row
        grad_NV = torch.exp(log_probs_NV).to(dtype)
        return loss, grad_NV.scatter(1, safe_N1, (torch.exp(picked_N1) - 1).to(dtype))
    grad_NV = log_probs_NV.exp_()  # in place: this matrix is most of the head's memory traffic
    grad_NV.scatter_(1, safe_N1, torch.exp(picked_N1) - 1)
    return loss, grad_NV.to(dtype)


def chunk_size(num_targets: int, vocab_size: int, *, logits_bytes: int = 2**26) -> int:
    """Targets per chunk so that float32 logits of one chunk take about `logits_bytes` (64 MiB), all at once twice that.

    >>> chunk_size(8192, 16384)
    1024
    """
    if 4 * vocab_size * num_targets <= 2 * logits_bytes:
        return num_targets  # a short second chunk costs more than it saves
    size = max(256, logits_bytes // (4 * vocab_size))
    size = 1 << (size.bit_length() - 1)  # a power of two divides the usual target counts: one shape, one kernel
    return min(size, num_targets)


def output_weight(model: nn.Module) -> nn.Parameter:
    """The output embedding [V, D] of a stock model.

    Raises:
        ModelError: the head has a bias, which the chunked loss does not compute.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{type(model).__name__} has a bias in its output head, which the chunked loss does not compute",
            where="model.kind",
            remedy="use a family without one: llama, qwen3, gpt2",
        )
    weight: nn.Parameter = head.weight
    return weight
