"""Products of linear layers in CPU steps, in bfloat16 with the gradient of the weight by a kernel of our own.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmssl.model.native import kernel, pointer, threads


@torch.library.custom_op("lmssl::weight_gradient", mutates_args=())
def weight_gradient(grad_NO: Tensor, hidden_NI: Tensor) -> Tensor:
    """`grad.T @ hidden`, [O, I], summed and kept in float32.

    Args:
        grad_NO, hidden_NI: bfloat16; O and I are multiples of 16.
    """
    grad_NO, hidden_NI = grad_NO.contiguous(), hidden_NI.contiguous()
    (tokens, outputs), inputs = grad_NO.shape, hidden_NI.shape[1]
    out = grad_NO.new_empty((outputs, inputs), dtype=torch.float32)
    sizes = map(ctypes.c_int64, (tokens, outputs, inputs))
    kernel("lmssl_weight_gradient", grad_NO.dtype)(
        pointer(grad_NO), pointer(hidden_NI), *sizes, pointer(out), threads()
    )
    return out


@weight_gradient.register_fake
def _weight_shape(grad_NO: Tensor, hidden_NI: Tensor) -> Tensor:
    return grad_NO.new_empty((grad_NO.shape[1], hidden_NI.shape[1]), dtype=torch.float32)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        narrow, weight = hidden.to(torch.bfloat16), _joined([part.to(torch.bfloat16) for part in weights])
        ctx.save_for_backward(narrow, weight)
        ctx.rows, ctx.dtypes = [len(part) for part in weights], (hidden.dtype, weights[0].dtype)
        return F.linear(narrow, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        of_hidden, of_weights = None, [None] * len(ctx.rows)
        if ctx.needs_input_grad[0]:
            of_hidden = (grads[0] @ weight).to(ctx.dtypes[0])
        if any(ctx.needs_input_grad[1:]):
            of_weight = weight_gradient(grads[0].flatten(0, -2), narrow.flatten(0, -2)).to(ctx.dtypes[1])
            of_weights = list(of_weight.split(ctx.rows))
        return of_hidden, *of_weights


def linear(hidden: Tensor, *weights_OI: Tensor) -> Tensor:
    """`F.linear` without a bias; under bf16 autocast with the gradient of the weight by the kernel.

    Args:
        weights_OI: of layers whose outputs are wanted one after another, of the same type.
    """
    fits = torch.is_autocast_enabled("cpu") and not any(size % 16 for weight in weights_OI for size in weight.shape)
    if not (fits and torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *weights_OI))):
        return F.linear(hidden, _joined(weights_OI))
    found: Tensor = _Linear.apply(hidden, *weights_OI)  # type: ignore[no-untyped-call]
    return found
