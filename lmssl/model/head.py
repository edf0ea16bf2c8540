"""The loss at targets, chunk by chunk of the `tokens x vocabulary` matrix.

Logits of a chunk of targets live only while that chunk's loss and gradients are taken. The gradient is computed in
the forward pass and scaled in the backward pass: three matrix products, and not the four of a recomputed head.

Shapes: N targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmssl.errors import ModelError
from lmssl.model import kernels, native

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
    hidden_ND = _in_product_type(hidden_ND)
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
    hidden_ND = _in_product_type(hidden_ND)
    parameters = (hidden_ND, weight_VD) if bias_V is None else (hidden_ND, weight_VD, bias_V)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in parameters)):
        return _forward_only(hidden_ND, weight_VD, bias_V, targets_N, chunk_targets)
    found: tuple[Tensor, Tensor] = _LossAndCorrect.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, chunk_targets
    )
    return found


def _in_product_type(hidden_ND: Tensor) -> Tensor:
    """What autocast makes of hidden states before every product, made once: gradients of logits have this type, too."""
    device = hidden_ND.device.type
    return hidden_ND.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_ND


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
        alone = hidden_ND.shape[0] <= chunk_targets
        grad_weight_VD: Tensor | None = None
        for start in range(0, hidden_ND.shape[0], chunk_targets):
            part = slice(start, start + chunk_targets)
            kept_N1 = (targets_N[part] != IGNORE)[:, None]
            product_NV = hidden_ND[part] @ weight.t()
            loss, _, grad_logits_NV = _loss_of_chunk(product_NV, None, targets_N[part], False)
            del product_NV
            total = total + loss
            # Rows that predict nothing are taken out here, where they are D wide, and not from the V wide gradient.
            grad_hidden.append((grad_logits_NV @ weight) * kept_N1)
            grad_weight_VD = _add_product(grad_weight_VD, hidden_ND[part] * kept_N1, grad_logits_NV, alone)
        assert grad_weight_VD is not None, "no targets' places"
        ctx.is_product = _is_product(grad_weight_VD, weight_VD)
        del weight
        ctx.save_for_backward(torch.cat(grad_hidden), _kept(grad_weight_VD, weight_VD))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight = ctx.saved_tensors
        grad_weight_VD = _scaled_weight(grad_weight, ctx.is_product, grad_hidden_ND.shape[1], grads[0])
        return _scaled(grad_hidden_ND, grads[0]), grad_weight_VD, None, None


_FURTHER_COLUMNS = 7
"""Zeros beside the ones that stand for a bias, for products on a GPU, which want widths of multiples of 8."""
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
        width, more = hidden_ND.shape[1], _FURTHER_COLUMNS if _on_gpu(hidden_ND) else 0
        alone = hidden_ND.shape[0] <= chunk_targets
        grad_VD: Tensor | None = None
        for start in range(0, hidden_ND.shape[0], chunk_targets):
            part = slice(start, start + chunk_targets)
            kept_N1 = (targets_N[part] != IGNORE)[:, None].to(hidden_ND.dtype)
            product_NV = hidden_ND[part] @ weight.t()
            loss, found, grad_logits_NV = _loss_of_chunk(product_NV, bias_V, targets_N[part], True)
            del product_NV
            total, correct = total + loss, correct + found
            grad_hidden.append((grad_logits_NV @ weight) * kept_N1)
            # The bias is the weight of a hidden unit that is 1 wherever there is a target: one more row of a product.
            seen_ND = torch.cat([hidden_ND[part] * kept_N1, kept_N1, kept_N1.new_zeros(len(kept_N1), more)], dim=1)
            grad_VD = _add_product(grad_VD, seen_ND, grad_logits_NV, alone)
        assert grad_VD is not None, "no targets' places"
        grad_bias_V = None if bias_V is None else grad_VD[:, width].to(bias_V.dtype)
        ctx.is_product = _is_product(grad_VD, weight_VD)
        ctx.save_for_backward(torch.cat(grad_hidden), _kept(grad_VD, weight_VD), grad_bias_V)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight, grad_bias_V = ctx.saved_tensors
        grad_bias_V = None if grad_bias_V is None else grad_bias_V * grads[0]
        grad_weight_VD = _scaled_weight(grad_weight, ctx.is_product, grad_hidden_ND.shape[1], grads[0])
        return _scaled(grad_hidden_ND, grads[0]), grad_weight_VD, grad_bias_V, None, None


def _add_product(total_VD: Tensor | None, left_ND: Tensor, right_NV: Tensor, alone: bool) -> Tensor:
    """`total_VD += right_NV.T @ left_ND`, summed in float32 and in place, or the product if it is the only one."""
    if alone and not _on_gpu(left_ND):
        product_DV = _product(_turned(left_ND), right_NV)
        return product_DV.t() if native.takes(product_DV) else product_DV.float().t()
    if total_VD is None:
        total_VD = _empty_sum(left_ND, right_NV)
    _plus_product(total_VD, left_ND, right_NV)
    return total_VD


def _is_product(grad_VD: Tensor, weight_VD: Tensor) -> bool:
    """Whether a gradient is one product still, [D or more, V], which a kernel turns and makes float32 as it scales."""
    fits = weight_VD.dtype == torch.float32 and not any(size % 16 for size in weight_VD.shape)
    return native.takes(grad_VD) and fits and grad_VD.stride(0) == 1


def _kept(grad_VD: Tensor, weight_VD: Tensor) -> Tensor:
    """What the backward pass makes the weight's gradient of."""
    if _is_product(grad_VD, weight_VD):
        return grad_VD.t()
    return grad_VD[:, : weight_VD.shape[1]].contiguous().to(weight_VD.dtype)


@torch.library.custom_op("lmssl::turned", mutates_args=())
def _turned(left_ND: Tensor) -> Tensor:
    """Its transpose, laid out by rows.

    An operator that the compiler does not look into: it would keep the old layout, and the product take twice as long.
    """
    return left_ND.t().contiguous()


@_turned.register_fake
def _(left_ND: Tensor) -> Tensor:
    return left_ND.new_empty(left_ND.shape[1], left_ND.shape[0])


_TILE_ELEMENTS = 2**20
"""Of a part of logits, or of the weight's gradient, that is worked on at once on CPU, where caches are small."""
_GPU_TILE_ELEMENTS = 2**25


def _empty_sum(left_ND: Tensor, right_NV: Tensor) -> Tensor:
    """Zeros [V, D], laid out as rounded products on CPU are, [D, V], where the compiler turns them anyway."""
    width, vocabulary = left_ND.shape[1], right_NV.shape[1]
    if torch.compiler.is_compiling() and not left_ND.is_cuda and left_ND.dtype != torch.float32:
        return left_ND.new_zeros(width, vocabulary, dtype=torch.float32).t()
    return left_ND.new_zeros(vocabulary, width, dtype=torch.float32)


@torch.library.custom_op("lmssl::plus_product", mutates_args={"total_VD"})
def _plus_product(total_VD: Tensor, left_ND: Tensor, right_NV: Tensor) -> None:
    """`total_VD += right_NV.T @ left_ND`, some rows of the vocabulary at a time.

    An operator that the compiler does not look into: it would transpose bfloat16 tiles of two matrices in one loop, and
    gcc 12 at -O3 makes garbage of that on CPUs with AVX-512 (torch 2.13; without SLP vectorisation it does not).
    """
    on_gpu = _on_gpu(left_ND)
    if left_ND.dtype == torch.float32:  # nothing is rounded in between
        total_VD.addmm_(right_NV.t(), left_ND)
        return
    if on_gpu and _sums_in_place(left_ND.device, left_ND.dtype):
        torch.addmm(total_VD, right_NV.t(), left_ND, out_dtype=torch.float32, out=total_VD)
        return
    turned_DN = left_ND.t() if on_gpu else left_ND.t().contiguous()
    rows = _tile_rows(left_ND.shape[1], _GPU_TILE_ELEMENTS if on_gpu else _TILE_ELEMENTS)
    for start in range(0, len(total_VD), rows):
        part_NV = right_NV[:, start : start + rows]
        if on_gpu:  # sums are not rounded in between, which CUDA alone offers
            product_VD = torch.mm(part_NV.t(), left_ND, out_dtype=torch.float32)
        else:
            product_VD = _product(turned_DN, part_NV).t()
        total_VD[start : start + rows] += product_VD


def _tile_rows(width: int, elements: int) -> int:
    """Rows of a tile: a multiple of 64 where there are as many, for products on a GPU want columns to begin there."""
    rows = max(1, elements // width)
    return rows - rows % 64 if rows >= 64 else rows


@cache
def _sums_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of 16 bits can be added to float32 where it lies, without a pass that reads and one that adds.

    Asked of a small product, once: not every version of torch takes a sum of another type than its factors.
    """
    left = torch.linspace(-1, 1, 64 * 128, device=device).reshape(64, 128).to(dtype)
    right = left[:, :64].flip(1)
    total = torch.full((128, 64), 0.125, device=device)
    expected = (left.double().t() @ right.double() + 0.125).float()
    try:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
        return torch.allclose(total, expected, rtol=1e-4, atol=1e-4)
    except (RuntimeError, TypeError):  # NotImplementedError is one of the former
        return False


def _product(left_DN: Tensor, right_NV: Tensor) -> Tensor:
    """`left_DN @ right_NV`, which runs faster on CPU than the other way round, transposed."""
    if left_DN.dtype == torch.float16:  # sums over thousands of targets leave its range, and no loss scale is in them
        return ((left_DN / _FLOAT16_ROOM) @ right_NV).float() * _FLOAT16_ROOM
    return left_DN @ right_NV


def _on_gpu(hidden_ND: Tensor) -> bool:
    """Whether this code runs on a GPU as it stands, and no compiler sees all of it."""
    return hidden_ND.is_cuda and not torch.compiler.is_compiling()


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, rounded once, in its place where no compiler looks on: it is large and nobody else's."""
    # A factor without dimensions would first be rounded to the gradient's type, though not by kernels on CPU.
    wide = factor.reshape(1)
    if torch.compiler.is_compiling():
        return (gradient * wide).to(gradient.dtype)
    return gradient.mul_(wide if gradient.is_cuda else factor)


def _scaled_weight(kept: Tensor, is_product: bool, width: int, factor: Tensor) -> Tensor:
    return kernels.scaled_gradient(kept, factor, width) if is_product else _scaled(kept, factor)


def _loss_of_chunk(
    product_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one chunk, right predictions (0 if they are not to be counted), and the gradient of its product.

    Where no compiler fuses it, a few rows at a time stay in the cache, and the gradient takes the product's place.
    """
    if _on_gpu(product_NV):
        found: tuple[Tensor, Tensor, Tensor] = _fused()(product_NV, bias_V, targets_N, count)
        return found
    if native.takes(product_NV):
        losses_N, correct_N = kernels.head_gradient(product_NV, bias_V, targets_N)
        return losses_N.sum(), correct_N.sum() if count else losses_N.new_zeros(()), product_NV
    if torch.compiler.is_compiling():
        return _of_product(product_NV, bias_V, targets_N, count)
    total, correct = (product_NV.new_zeros((), dtype=torch.float32) for _ in range(2))
    rows = max(1, _TILE_ELEMENTS // product_NV.shape[1])
    for start in range(0, len(product_NV), rows):
        part = slice(start, start + rows)
        loss, right, gradient_NV = _of_product(product_NV[part], bias_V, targets_N[part], count)
        total, correct = total + loss, correct + right
        product_NV[part] = gradient_NV
    return total, correct, product_NV


def _of_product(
    product_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = product_NV.float() if bias_V is None else product_NV.float() + bias_V.float()
    loss, gradient_NV = _chunk(logits_NV, targets_N, product_NV.dtype)
    return loss, _correct(logits_NV, targets_N) if count else loss.new_zeros(()), gradient_NV


@cache
def _fused() -> Callable[..., Any]:
    """`_of_product` as two passes over memory; where layers are compiled one by one, nothing else would fuse it."""
    return torch.compile(_of_product, dynamic=False)


def _chunk(logits_NV: Tensor, targets_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of one chunk, and its gradient with respect to the logits as if every row had a target."""
    log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
    kept_N = targets_N != IGNORE
    safe_N1 = torch.where(kept_N, targets_N, 0)[:, None]
    picked_N1 = log_probs_NV.gather(1, safe_N1)
    loss = -torch.where(kept_N, picked_N1[:, 0], 0.0).sum()
    if torch.compiler.is_compiling():  # one fused loop, and one entry a row
        grad_NV = torch.exp(log_probs_NV).to(dtype)
        rows_N = torch.arange(len(grad_NV), device=grad_NV.device)
        # By `scatter`, torch would copy all of a 16-bit matrix on CPU, there and back.
        return loss, grad_NV.index_put((rows_N, safe_N1[:, 0]), (torch.exp(picked_N1) - 1).to(dtype)[:, 0])
    grad_NV = log_probs_NV.exp_()  # in place: this matrix is most of the head's memory traffic
    grad_NV.scatter_(1, safe_N1, torch.exp(picked_N1) - 1)
    return loss, grad_NV.to(dtype)


LOGITS_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Of one chunk, by kind of device, its gradient left out; on a GPU as if float32, which keeps it busy."""
_GPU_BYTES_PER_TARGET = 2**15
"""Of one chunk, for all targets of the micro-batch: a small one's chunk stays small beside its activations."""


def chunk_size(num_targets: int, vocab_size: int, *, device: str = "cpu", logits_bytes: int | None = None) -> int:
    """Targets per chunk so that logits of one chunk take about `logits_bytes`, all at once twice that.

    On CPU they count in the type of the present autocast's products; elsewhere as float32.

    Args:
        device: its kind.
        logits_bytes: None: 64 MiB, on a GPU 512 MiB, or less for a few targets.

    >>> chunk_size(8192, 16384)
    1024
    >>> with torch.autocast("cpu", torch.bfloat16): chunk_size(8192, 16384)
    2048
    """
    if logits_bytes is None:
        logits_bytes = LOGITS_BYTES.get(device, 2**26)
        if device == "cuda":
            logits_bytes = min(logits_bytes, max(2**26, _GPU_BYTES_PER_TARGET * num_targets))
    narrow = device == "cpu" and torch.is_autocast_enabled(device)
    row_bytes = vocab_size * (torch.get_autocast_dtype(device).itemsize if narrow else 4)
    if row_bytes * num_targets <= 2 * logits_bytes:
        return num_targets  # a short second chunk costs more than it saves
    size = max(256, logits_bytes // row_bytes)
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
