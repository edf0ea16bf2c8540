"""The head as it runs on a GPU: on one where there is one, and its code on CPU with what only CUDA has put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lmssl.model import head
from lmssl.model.head import IGNORE, LOGITS_BYTES, chunk_size, loss_and_correct, summed_cross_entropy

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def problem(device: str = "cpu") -> list[torch.Tensor]:
    """Hidden states, weight, bias, targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((37, 16), (53, 16), (53,)))
    targets = torch.randint(0, 53, (37,), generator=generator)
    targets[[0, 5, 36]] = IGNORE
    return [*(x.to(device).requires_grad_() for x in (hidden, weight, bias)), targets.to(device)]


def check(device: str, chunk: int, tolerance: float) -> None:
    """Losses, right answers and gradients, with and without a bias, against torch's in float32 on CPU."""
    hidden, weight, bias, targets = problem()
    for with_bias in (False, True):
        logits = hidden @ weight.t() + (bias if with_bias else 0.0)
        expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        given = problem(device)
        used = given[:3] if with_bias else given[:2]
        wanted = torch.autograd.grad(expected * 0.37, [hidden, weight, bias][: len(used)])
        if with_bias:
            loss, correct = loss_and_correct(*given, chunk_targets=chunk)
            right = (logits.argmax(-1) == targets).sum().item()
            assert abs(correct.item() - right) <= (0 if tolerance < 1e-3 else 1)
        else:
            loss = summed_cross_entropy(given[0], given[1], given[3], chunk_targets=chunk)
        torch.testing.assert_close(loss.cpu(), expected, rtol=tolerance, atol=0)
        for got, other in zip(torch.autograd.grad(loss * 0.37, used), wanted, strict=True):
            assert got.dtype == torch.float32
            assert float((got.cpu() - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("chunk", [1, 8, 37])
def test_the_code_for_a_gpu_is_the_same_function(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_on_gpu", lambda _: not torch.compiler.is_compiling())
    monkeypatch.setattr(head, "_fused", lambda: head._of_product)
    monkeypatch.setattr(head, "_GPU_TILE_ELEMENTS", 16 * 10)  # the gradient of the weight in six parts
    check("cpu", chunk, 1e-4)


def test_what_the_fused_loss_is_made_of_compiles() -> None:
    compiled = torch.compile(head._of_product, backend="aot_eager", dynamic=False)
    hidden, weight, bias, targets = problem()
    product = (hidden @ weight.t()).detach()
    for given in ((product, None, targets, False), (product, bias.detach(), targets, True)):
        for got, other in zip(compiled(*given), head._of_product(*given), strict=True):
            assert torch.allclose(got, other, atol=1e-5)


def test_a_chunk_on_a_gpu_is_larger() -> None:
    assert chunk_size(65536, 50304, device="cuda") == LOGITS_BYTES["cuda"] // (4 * 50304 * 2048) * 2048 == 2048
    assert chunk_size(65536, 50304) == 256
    assert chunk_size(65536, 131072, device="cuda") == 1024
    assert chunk_size(8192, 131072, device="cuda") == 512, "a small micro-batch has few activations to hide a chunk"
    assert chunk_size(8192, 1024, device="cuda") == 8192


def test_tiles_begin_where_products_want_columns_to_begin() -> None:
    assert head._tile_rows(768, head._GPU_TILE_ELEMENTS) == 43648 == 682 * 64
    assert [head._tile_rows(16, elements) for elements in (1, 160, 64 * 16)] == [1, 10, 64]


def test_sums_in_place_are_asked_for_and_used_only_where_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, sums = torch.addmm, head._sums_in_place.__wrapped__
    device = torch.device("cpu")
    assert not sums(device, torch.bfloat16), "torch has this for CUDA only"

    def addmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return plain(total, left.float(), right.float(), out=kwargs["out"])

    monkeypatch.setattr(torch, "addmm", addmm)
    assert sums(device, torch.bfloat16)
    monkeypatch.setattr(head, "_on_gpu", lambda _: True)
    monkeypatch.setattr(head, "_sums_in_place", sums)
    left, right, total = torch.randn(40, 16).bfloat16(), torch.randn(40, 24).bfloat16(), torch.ones(24, 16)
    head._plus_product(total, left, right)
    torch.testing.assert_close(total, right.float().t() @ left.float() + 1)
    monkeypatch.setattr(torch, "addmm", lambda total, left, right, **_: total.add_((left @ right).float()))
    assert not sums(device, torch.bfloat16), "sums are rounded"


def test_the_factor_of_a_gradient_is_not_rounded() -> None:
    """Neither in place nor compiled, where the gradient is rounded once and the factor never."""
    gradient, factor = torch.randn(1000).bfloat16(), torch.tensor(1 / 3777)
    exact = (gradient.double() * factor.double()).bfloat16()
    compiled = torch.compile(head._scaled, backend="aot_eager", dynamic=False)
    for scaled in (compiled, head._scaled):
        assert torch.equal(scaled(gradient.clone(), factor), exact)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("chunk", [8, 37])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_it_is_the_same_function(chunk: int, autocast: bool) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        check("cuda", chunk, 0.02 if autocast else 1e-4)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_sums_of_the_weights_gradient_are_not_rounded() -> None:
    left, right = (torch.randn(4096, n, device="cuda").bfloat16() for n in (64, 96))
    exact = right.double().t() @ left.double()
    total = torch.ones(96, 64, device="cuda")
    head._plus_product(total, left, right)
    assert float((total - 1 - exact).norm() / exact.norm()) < 1e-5
