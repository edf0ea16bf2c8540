"""Attention by matrix products equals plain attention, gradients included, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmssl.model import products
from lmssl.model.products import products_attention
from lmssl.train.launch import can_compile


def inputs(length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key and value as a model lays them out, the gradient of the output, and a mask of three documents."""
    draw = torch.Generator().manual_seed(length)
    shape = (2, length, 3, 16)
    query, key, value, grad = (torch.randn(shape, generator=draw).to(dtype).transpose(1, 2) for _ in range(4))
    segments = torch.arange(length) * 3 // length
    mask = (segments[:, None] == segments[None, :])[None, None].expand(2, 1, length, length)
    return [x.detach().requires_grad_() for x in (query, key, value)], grad, mask


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)


def check(length: int, dtype: torch.dtype, causal: bool, positions: bool = False) -> None:
    """Output and gradients lie hardly farther from exact ones than those of attention written down plainly."""
    tensors, grad, mask = inputs(length, dtype)
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    if positions:
        draw = torch.Generator().manual_seed(1)
        made = torch.randn(length, length, 3, generator=draw).permute(2, 0, 1)[None]  # as T5 lays it out
        tensors.append(made.detach().requires_grad_())

    def plain(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        query, key, value, *position = tensors
        scores = sum(position, (query @ key.transpose(2, 3)) * 0.3)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(value.dtype) @ value
        return out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))

    exact = plain([x.detach().double().requires_grad_() for x in tensors])
    query, key, value, *position = tensors
    bias = position[0] if positions else None
    out = products_attention(query, key, value, mask, causal=causal, scale=0.3, position_bias=bias)
    assert out.dtype == dtype
    found = (out, *torch.autograd.grad(out, tensors, grad))
    for i, (ours, theirs, true) in enumerate(zip(found, plain(tensors), exact, strict=True)):
        # The bias's gradient is not rounded, so that there the rounding of `out` shows, of which the softmax's is made.
        room = 1.5 if i == 4 else 1.2
        assert error(ours, true) <= (1e-6 if dtype == torch.float32 else room * error(theirs, true))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 128, 300, 520])
def test_equals_plain_attention(length: int, causal: bool) -> None:
    check(length, torch.float32, causal)
    if length >= 128:  # gradients of two or three tokens are what cancellation leaves of them
        check(length, torch.bfloat16, causal)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [128, 300])
def test_equals_plain_attention_with_a_bias_by_position(length: int, causal: bool) -> None:
    check(length, torch.float32, causal, positions=True)
    check(length, torch.bfloat16, causal, positions=True)


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")
@pytest.mark.parametrize("length", [160, 512])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_compiled_equals_plain_attention(length: int) -> None:
    check(length, torch.bfloat16, True)
    check(length, torch.bfloat16, False, positions=True)


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_graph_around_it_knows_the_shapes() -> None:
    """Strides that an operator's fake kernel promises are asserted by compiled code alone."""
    (query, key, value), _, mask = inputs(160, torch.bfloat16)
    table = torch.randn(160, 160, 3, requires_grad=True)

    def loss(table: Tensor) -> Tensor:
        position = table.permute(2, 0, 1)[None] * 2
        return products_attention(query, key, value, mask, causal=False, scale=0.3, position_bias=position).sum()

    (expected,) = torch.autograd.grad(loss(table), table)
    (found,) = torch.autograd.grad(torch.compile(loss)(table), table)
    assert error(found, expected.double()) < 1e-5


@pytest.mark.usefixtures("uncompiled")
def test_operators_are_sound() -> None:
    (query, key, value), _, mask = inputs(130, torch.float32)
    bias = torch.where(mask, 0.0, -torch.inf).to(torch.bfloat16)
    tensors = [x.detach().contiguous().requires_grad_() for x in (query, key, value)]
    positions = torch.randn(130, 130, 3).permute(2, 0, 1)[None].requires_grad_()
    for position in (None, positions):
        torch.library.opcheck(torch.ops.lmssl.products_attention.default, (*tensors, bias, position, True, 0.3))


def test_blocks_cover_what_a_causal_mask_shows() -> None:
    assert products._blocks(512, 512, True) == [(0, 128, 128), (128, 256, 256), (256, 384, 384), (384, 512, 512)]
    assert products._blocks(130, 130, True) == [(0, 128, 128), (128, 130, 130)]
    assert products._blocks(512, 40, False) == [(0, 512, 40)]
