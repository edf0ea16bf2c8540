"""The chunked loss at targets: value and gradients of the ordinary head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig

from lmssl.errors import ModelError
from lmssl.model.head import IGNORE, chunk_size, output_weight, summed_cross_entropy


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
