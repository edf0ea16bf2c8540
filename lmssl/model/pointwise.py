"""Pointwise operators of feed-forward layers, norms and embeddings, by kernels of our own; see `kernels.py`.

Shapes: N tokens, D width, F width of a feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lmssl.model.kernels import turned_and_scaled
from lmssl.model.native import kernel, pointer, threads

_PARTS = 32
"""Parts of the tokens whose gradients of a vector are summed apart, as many threads at most sum them."""


@torch.library.custom_op("lmssl::gelu", mutates_args=())
def gelu(product_NF: Tensor, bias_F: Tensor) -> Tensor:
    """GELU of a product and its bias, by the error function, float32 or bfloat16 as the product.

    Source: Abramowitz and Stegun 7.1.26; of the error function it is within 1.5e-7.
    """
    product_NF, bias_F = product_NF.contiguous(), bias_F.float().contiguous()
    out = torch.empty_like(product_NF)
    rows, width = product_NF.numel() // product_NF.shape[-1], product_NF.shape[-1]
    pointers = map(pointer, (product_NF, bias_F, out))
    kernel("lmssl_gelu", product_NF.dtype)(*pointers, ctypes.c_int64(rows), ctypes.c_int64(width), threads())
    return out


@gelu.register_fake
def _gelu_shape(product_NF: Tensor, bias_F: Tensor) -> Tensor:
    return torch.empty_like(product_NF, memory_format=torch.contiguous_format)


@torch.library.custom_op("lmssl::gelu_backward", mutates_args=())
def _gelu_gradients(grad: Tensor, product_NF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    grad, product_NF, bias_F = grad.contiguous(), product_NF.contiguous(), bias_F.float().contiguous()
    rows, width = product_NF.numel() // product_NF.shape[-1], product_NF.shape[-1]
    of_product, of_bias = torch.empty_like(product_NF), bias_F.new_empty(_PARTS, width)
    sizes = map(ctypes.c_int64, (rows, width, _PARTS))
    pointers = map(pointer, (grad, product_NF, bias_F, of_product, of_bias))
    kernel("lmssl_gelu_backward", product_NF.dtype)(*pointers, *sizes, threads())
    return of_product, of_bias[0].clone()


@_gelu_gradients.register_fake
def _gelu_gradients_shapes(grad: Tensor, product_NF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(product_NF, memory_format=torch.contiguous_format), torch.empty_like(bias_F)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


gelu.register_autograd(lambda ctx, grad: _gelu_gradients(grad, *ctx.saved_tensors), setup_context=_save_inputs)


@torch.library.custom_op("lmssl::embedding_gradient", mutates_args=())
def embedding_gradient(grad_ND: Tensor, ids_N: Tensor, vocabulary: int, padding: int) -> Tensor:
    """Gradient [V, D] of rows that were looked up, float32; that of the row `padding` is zero, -1: of no row."""
    out = grad_ND.new_empty((vocabulary, grad_ND.shape[1]), dtype=torch.float32)
    _add_rows(out, grad_ND, ids_N, padding, more=False)
    return out


def _add_rows(out_VD: Tensor, grad_ND: Tensor, ids_N: Tensor, padding: int, *, more: bool) -> None:
    grad_ND, ids_N = grad_ND.float().contiguous(), ids_N.to(torch.int64).contiguous()
    sizes = map(ctypes.c_int64, (*grad_ND.shape, len(out_VD), padding, int(more)))
    kernel("lmssl_embedding_gradient")(pointer(grad_ND), pointer(ids_N), *sizes, pointer(out_VD), threads())


@embedding_gradient.register_fake
def _embedding_shape(grad_ND: Tensor, ids_N: Tensor, vocabulary: int, padding: int) -> Tensor:
    return grad_ND.new_empty((vocabulary, grad_ND.shape[1]), dtype=torch.float32)


@torch.library.custom_op("lmssl::tied_gradient", mutates_args=())
def tied_gradient(
    product_DV: Tensor, factor: Tensor, width: int, grad_ND: Tensor, ids_N: Tensor, padding: int
) -> Tensor:
    """`scaled_gradient` of a head plus `embedding_gradient` of the same matrix, in one matrix [V, D]."""
    out = turned_and_scaled(product_DV, factor, width)
    _add_rows(out, grad_ND, ids_N, padding, more=True)
    return out


@tied_gradient.register_fake
def _tied_shape(product_DV: Tensor, factor: Tensor, width: int, *_: Any) -> Tensor:
    return product_DV.new_empty((product_DV.shape[1], width), dtype=torch.float32)


@torch.library.custom_op("lmssl::swiglu", mutates_args=())
def swiglu(product: Tensor) -> Tensor:
    """`silu(gate) * up` of a product [N, 2 F] that has gates first, float32 or bfloat16 as the product.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    product = product.contiguous()
    out = product.new_empty((*product.shape[:-1], product.shape[-1] // 2))
    sizes = ctypes.c_int64(out.numel() // out.shape[-1]), ctypes.c_int64(out.shape[-1])
    kernel("lmssl_swiglu", product.dtype)(pointer(product), pointer(out), *sizes, threads())
    return out


@swiglu.register_fake
def _swiglu_shape(product: Tensor) -> Tensor:
    return product.new_empty((*product.shape[:-1], product.shape[-1] // 2))


@torch.library.custom_op("lmssl::swiglu_backward", mutates_args=())
def _swiglu_gradient(grad: Tensor, product: Tensor) -> Tensor:
    grad, product = grad.contiguous(), product.contiguous()
    found = torch.empty_like(product)
    sizes = ctypes.c_int64(grad.numel() // grad.shape[-1]), ctypes.c_int64(grad.shape[-1])
    kernel("lmssl_swiglu_backward", product.dtype)(*map(pointer, (grad, product, found)), *sizes, threads())
    return found


@_swiglu_gradient.register_fake
def _swiglu_gradient_shape(grad: Tensor, product: Tensor) -> Tensor:
    return torch.empty_like(product, memory_format=torch.contiguous_format)


swiglu.register_autograd(lambda ctx, grad: _swiglu_gradient(grad, *ctx.saved_tensors), setup_context=_save_inputs)


@torch.library.custom_op("lmssl::residual_norm", mutates_args=())
def residual_norm(
    product_ND: Tensor, bias_D: Tensor, around_ND: Tensor, weight_D: Tensor, shift_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Layer norm of `product + bias + around` in float32, and mean and 1 / deviation of each token, [N, 2].

    Args:
        product_ND: float32 or bfloat16, of any number of dimensions, D a multiple of 16.
        around_ND: float32, what goes around the layer.
    Source: Ba et al. 2016; the variance is that of the centred sum.
    """
    inputs = _norm_inputs(product_ND, bias_D, around_ND, weight_D)
    out, rows = torch.empty_like(inputs[2]), product_ND.numel() // product_ND.shape[-1]
    statistics, shift_D = out.new_empty(rows, 2), shift_D.float().contiguous()
    sizes = map(ctypes.c_int64, (rows, product_ND.shape[-1]))
    pointers = map(pointer, (*inputs, shift_D))
    made = map(pointer, (out, statistics))
    kernel("lmssl_norm", product_ND.dtype)(*pointers, ctypes.c_float(eps), *sizes, *made, threads())
    return out, statistics


@residual_norm.register_fake
def _norm_shapes(product_ND: Tensor, bias_D: Tensor, around_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(around_ND, dtype=torch.float32, memory_format=torch.contiguous_format)
    return out, out.new_empty(product_ND.numel() // product_ND.shape[-1], 2)


@torch.library.custom_op("lmssl::residual_norm_backward", mutates_args=())
def _norm_gradients(
    grad_ND: Tensor, product_ND: Tensor, bias_D: Tensor, around_ND: Tensor, weight_D: Tensor, statistics_N2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of product (in float32 that of what goes around it: empty), of that, and, [3, D], of three vectors."""
    grad_ND, inputs = grad_ND.float().contiguous(), _norm_inputs(product_ND, bias_D, around_ND, weight_D)
    width = product_ND.shape[-1]
    of_product, of_around = _other_than_float32(inputs[0]), torch.empty_like(inputs[2])
    of_vectors = of_around.new_empty(_PARTS, 3, width)
    sizes = map(ctypes.c_int64, (product_ND.numel() // width, width, _PARTS))
    given = map(pointer, (grad_ND, *inputs, statistics_N2.contiguous()))
    made = map(pointer, (of_product if len(of_product) else None, of_around, of_vectors))
    kernel("lmssl_norm_backward", product_ND.dtype)(*given, *sizes, *made, threads())
    return of_product, of_around, of_vectors[0].clone()


@_norm_gradients.register_fake
def _norm_gradients_shapes(
    grad_ND: Tensor, product_ND: Tensor, bias_D: Tensor, around_ND: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_around = torch.empty_like(around_ND, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _other_than_float32(product_ND), of_around, of_around.new_empty(3, product_ND.shape[-1])


def _other_than_float32(like: Tensor) -> Tensor:
    """Room for numbers that are rounded to 16 bits, or none."""
    return like.new_empty(0 if like.dtype == torch.float32 else like.shape)


def _norm_inputs(product: Tensor, bias: Tensor, around: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return product.contiguous(), bias.float().contiguous(), around.float().contiguous(), weight.float().contiguous()


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    product, bias, around, weight, _, _ = inputs
    ctx.save_for_backward(product, bias, around, weight, output[1])


def _norm_backward(ctx: Any, grad: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    of_product, of_around, of_vectors = _norm_gradients(grad, *ctx.saved_tensors)
    of_weight, of_shift, of_bias = of_vectors.unbind()
    return of_product if len(of_product) else of_around, of_bias, of_around, of_weight, of_shift, None


residual_norm.register_autograd(_norm_backward, setup_context=_save_norm)


@torch.library.custom_op("lmssl::rms_norm", mutates_args=())
def _rms_norm(
    product: Tensor | None, around_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`product + around` in float32 (empty without a product), its norm in a type, and 1 / size of tokens, [N]."""
    product = None if product is None else product.contiguous()
    around_ND, weight_D = around_ND.contiguous(), weight_D.float().contiguous()
    total, out, scales = _rms_room(product, around_ND, dtype)
    sizes = ctypes.c_float(eps), ctypes.c_int64(len(scales)), ctypes.c_int64(around_ND.shape[-1])
    given, made = map(pointer, (product, around_ND, weight_D)), map(pointer, (total, out, scales))
    kernel("lmssl_rms_norm", out.dtype)(*given, *sizes, *made, threads())
    return total, out, scales


def _rms_room(product: Tensor | None, around_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = around_ND.new_empty(0 if product is None else around_ND.shape)
    rows = around_ND.numel() // around_ND.shape[-1]
    return total, around_ND.new_empty(around_ND.shape, dtype=dtype), around_ND.new_empty(rows)


@_rms_norm.register_fake
def _rms_shapes(
    product: Tensor | None, around_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _rms_room(product, around_ND, dtype)


@torch.library.custom_op("lmssl::rms_norm_backward", mutates_args=())
def _rms_gradients(
    grad_ND: Tensor, past_ND: Tensor, total_ND: Tensor, weight_D: Tensor, scales_N: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, [N, D], the same in bfloat16 (where it is not wanted, empty) and that of the weight."""
    grad_ND, past_ND, total_ND = grad_ND.contiguous(), past_ND.contiguous(), total_ND.contiguous()
    of_total, of_product, of_weight = _rms_gradients_room(total_ND, narrow)
    sizes = map(ctypes.c_int64, (len(scales_N), total_ND.shape[-1], _PARTS))
    given = map(pointer, (grad_ND, past_ND, total_ND, weight_D.float().contiguous(), scales_N.contiguous()))
    made = map(pointer, (of_total, of_product if narrow else None, of_weight))
    kernel("lmssl_rms_norm_backward", grad_ND.dtype)(*given, *sizes, *made, threads())
    return of_total, of_product, of_weight[0].clone()


def _rms_gradients_room(total_ND: Tensor, narrow: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_product = total_ND.new_empty(total_ND.shape if narrow else 0, dtype=torch.bfloat16)
    return total_ND.new_empty(total_ND.shape), of_product, total_ND.new_empty(_PARTS, total_ND.shape[-1])


@_rms_gradients.register_fake
def _rms_gradients_shapes(
    grad_ND: Tensor, past_ND: Tensor, total_ND: Tensor, weight_D: Tensor, scales_N: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_total, of_product, _ = _rms_gradients_room(total_ND, narrow)
    return of_total, of_product, total_ND.new_empty(total_ND.shape[-1])


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: Tensor | None, around_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, out, scales = _rms_norm(product, around_ND, weight_D, eps, dtype)
        total = around_ND.view_as(around_ND) if product is None else total
        ctx.save_for_backward(total, weight_D, scales)
        ctx.has_product, ctx.narrow = product is not None, product is not None and dtype != torch.float32
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight_D, scales = ctx.saved_tensors
        past, grad = grads
        of_total, of_product, of_weight = _rms_gradients(grad, past, total, weight_D, scales, ctx.narrow)
        of_product = of_product if ctx.narrow else of_total
        return of_product if ctx.has_product else None, of_total, of_weight.to(weight_D.dtype), None, None


def rms_norm(
    product: Tensor | None, around_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`product + around` in float32, and its root mean square norm in a type; gradients of both in one pass.

    Args:
        product: of the type, of any number of dimensions, D a multiple of 16; None: there is only what goes around.
        around_ND: float32.
        dtype: float32 or bfloat16.
    Source: Zhang and Sennrich 2019; as transformers' llama, in float32, but rounded once.
    """
    inputs = (product, around_ND, weight_D, eps, dtype)
    found: tuple[Tensor, Tensor] = _RmsNorm.apply(*inputs)  # type: ignore[no-untyped-call]
    return found
