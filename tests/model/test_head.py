"""The chunked loss at targets: value and gradients of the ordinary head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig

from lmssl.errors import ModelError
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct, output_weight, summed_cross_entropy
from lmssl.train.launch import can_compile


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(53, 16, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(0, 53, (37,))
    targets[[0, 5, 36]] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_value_and_gradients_equal_torch(chunk: int) -> None:
    hidden, weight, targets = problem()
    expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.37, (hidden, weight))
    ours = summed_cross_entropy(hidden, weight, targets, chunk_targets=chunk)
    got = torch.autograd.grad(ours * 0.37, (hidden, weight))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_form_for_the_compiler_is_the_same_function() -> None:
    hidden, weight, targets = problem()
    eager = summed_cross_entropy(hidden, weight, targets, chunk_targets=8)
    compiled = torch.compile(summed_cross_entropy, backend="aot_eager")(hidden, weight, targets, chunk_targets=8)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(eager, (hidden, weight))
    for a, b in zip(torch.autograd.grad(compiled, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_gradient_the_value_is_the_same() -> None:
    hidden, weight, targets = problem()
    with torch.no_grad():
        got = summed_cross_entropy(hidden, weight, targets, chunk_targets=8)
    torch.testing.assert_close(got, summed_cross_entropy(hidden, weight, targets, chunk_targets=8), rtol=1e-6, atol=0)


def test_no_targets_is_zero_with_zero_gradient() -> None:
    hidden, weight, _ = problem()
    loss = summed_cross_entropy(hidden, weight, torch.full((37,), IGNORE), chunk_targets=8)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert all(not g.any() for g in grads)


def test_bf16_hidden_states_give_a_float32_weight_gradient() -> None:
    hidden, weight, targets = problem()
    loss = summed_cross_entropy(hidden.bfloat16(), weight, targets, chunk_targets=8)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32
    reference = F.cross_entropy((hidden @ weight.t()), targets, ignore_index=IGNORE, reduction="sum")
    (wanted,) = torch.autograd.grad(reference, weight)
    assert float((grad - wanted).norm() / wanted.norm()) < 0.02


def test_never_holds_tokens_by_vocabulary() -> None:
    """The largest tensor alive inside has chunk x vocabulary elements, not tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Largest():
        summed_cross_entropy(hidden, weight, torch.randint(0, 1000, (512,)), chunk_targets=32).backward()
    assert largest == 32 * 1000


@pytest.mark.parametrize(("targets", "vocab"), [(8192, 16384), (4096, 131072), (100, 1000)])
def test_chunk_size_is_bounded(targets: int, vocab: int) -> None:
    size = chunk_size(targets, vocab)
    assert 1 <= size <= targets
    assert size == targets or size == 256 or 4 * size * vocab <= 2**26


def test_a_head_with_bias_is_refused() -> None:
    config = PhiConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="bias"):
        output_weight(AutoModelForCausalLM.from_config(config))


def test_output_weight_is_the_tied_embedding() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert output_weight(model) is model.transformer.wte.weight


def biased() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, targets = problem()
    return hidden, weight, torch.randn(53, requires_grad=True), targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_gradients_and_correct_answers_equal_torch(chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = biased()
    right = (hidden @ weight.t() + (bias if with_bias else 0)).argmax(-1)
    targets = torch.where((torch.arange(37) % 3 == 0) & (targets != IGNORE), right, targets)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    logits = hidden @ weight.t() + bias if with_bias else hidden @ weight.t()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.37, inputs)
    ours, correct = loss_and_correct(hidden, weight, bias if with_bias else None, targets, chunk_targets=chunk)
    got = torch.autograd.grad(ours * 0.37, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    assert correct.item() == (right == targets).sum().item() > 10
    assert not correct.requires_grad
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_bias_it_is_the_summed_cross_entropy() -> None:
    hidden, weight, targets = problem()
    ours = loss_and_correct(hidden, weight, None, targets, chunk_targets=8)[0]
    assert torch.equal(ours, summed_cross_entropy(hidden, weight, targets, chunk_targets=8))


def test_loss_and_correct_for_the_compiler_in_one_graph() -> None:
    hidden, weight, bias, targets = biased()
    eager = loss_and_correct(hidden, weight, bias, targets, chunk_targets=8)
    compiled = torch.compile(loss_and_correct, backend="aot_eager", fullgraph=True, dynamic=False)(
        hidden, weight, bias, targets, chunk_targets=8
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(eager[0], (hidden, weight, bias))
    for a, b in zip(torch.autograd.grad(compiled[0], (hidden, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_gradient_loss_and_correct_are_the_same() -> None:
    hidden, weight, bias, targets = biased()
    with torch.no_grad():
        got = loss_and_correct(hidden, weight, bias, targets, chunk_targets=8)
    wanted = loss_and_correct(hidden, weight, bias, targets, chunk_targets=8)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_rows_without_any_target_are_harmless(grad: bool) -> None:
    hidden, weight, bias, _ = biased()
    with torch.set_grad_enabled(grad):
        loss, correct = loss_and_correct(hidden, weight, bias, torch.full((37,), IGNORE), chunk_targets=8)
    assert (loss.item(), correct.item()) == (0.0, 0.0)
    if grad:
        assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_equal_logits_predict_nothing() -> None:
    hidden, weight = torch.zeros(6, 4), torch.zeros(5, 4)
    targets = torch.tensor([0, 1, 2, 3, 4, IGNORE])
    assert loss_and_correct(hidden, weight, None, targets, chunk_targets=4)[1].item() == 0


def test_autocast_keeps_gradients_in_float32() -> None:
    hidden, weight, bias, targets = biased()
    reference = F.cross_entropy(hidden @ weight.t() + bias, targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(reference, (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_and_correct(hidden, weight, bias, targets, chunk_targets=8)
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype == torch.float32
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_several_chunks_compile_to_finite_gradients() -> None:
    """A fixed graph of torch 2.13 summed and transposed the products of two chunks into garbage, on some CPUs."""

    def loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_ND = torch.nn.functional.linear(hidden_ND, torch.eye(64))
            rows_ND = torch.nn.functional.embedding(targets_N, weight_VD)  # a tied embedding's gradient is added
            return summed_cross_entropy(hidden_ND + rows_ND, weight_VD, targets_N, chunk_targets=256)

    torch.manual_seed(0)
    hidden_ND, targets_N = torch.randn(616, 64, requires_grad=True), torch.randint(0, 4096, (616,))
    weight_VD = (torch.randn(4096, 64) * 0.02).requires_grad_()
    expected = torch.autograd.grad(loss(hidden_ND, weight_VD, targets_N), (hidden_ND, weight_VD))
    compiled = torch.compile(loss, dynamic=False)
    found = torch.autograd.grad(compiled(hidden_ND, weight_VD, targets_N), (hidden_ND, weight_VD))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
