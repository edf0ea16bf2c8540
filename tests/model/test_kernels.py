"""The C++ kernels against plain float64 formulas; where a processor cannot run them, nothing here is tested."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lmssl.model import head, kernels, native, pointwise
from lmssl.model.attention import document_attention, document_kwargs

pytestmark = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")

needs_bf16 = pytest.mark.skipif(not native.processor_can(torch.bfloat16), reason="no AVX-512 for bfloat16")
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]
by_types = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert native.load()


def documents(rows: int, length: int, mean: int) -> Tensor:
    """Segments [rows, length] of documents of random lengths, the last one padding."""
    found = torch.zeros(rows, length, dtype=torch.int32)
    for row in found:
        start, number = 0, 1
        while start < length - length // 8:
            size = int(torch.randint(1, 2 * mean, (1,)))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, causal: bool, scale: float, window: int) -> Tensor:
    """Attention by the definition, in the type of its arguments."""
    length, index = q.shape[2], torch.arange(q.shape[2])
    seen = torch.ones(1, length, length, dtype=torch.bool)
    if segments is not None:
        seen = segments[:, :, None] == segments[:, None, :]
    if causal:
        seen = seen & (index[:, None] >= index[None])
    if window:
        seen = seen & ((index[:, None] - index[None]).abs() < window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def far(found: Tensor, wanted: Tensor, rounded: float) -> bool:
    """Whether the difference is more than rounding makes, as a share of the whole.

    Args:
        rounded: the most in bfloat16; in float32 it is a ten-thousandth of that.
    """
    difference = (found.double() - wanted).detach().norm() / wanted.detach().norm()
    return not difference < (rounded if found.dtype == torch.bfloat16 else rounded * 1e-4)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "length", "width", "causal", "window", "mean"),
    [
        (2, 3, 3, 200, 64, True, 0, 50),
        (2, 4, 2, 129, 32, False, 0, 30),
        (1, 2, 2, 128, 64, True, 0, 1000),
        (2, 2, 1, 333, 96, True, 40, 200),
        (2, 2, 2, 333, 128, False, 40, 200),
        (1, 2, 2, 17, 64, True, 0, 5),
        (3, 2, 2, 512, 64, False, 0, 2),
        (1, 1, 1, 1, 32, True, 0, 1),
    ],
)
@pytest.mark.parametrize("inside_tokens", [True, False])
@by_types
def test_attention_and_its_gradients(
    dtype: torch.dtype,
    rows: int,
    heads: int,
    groups: int,
    length: int,
    width: int,
    causal: bool,
    window: int,
    mean: int,
    inside_tokens: bool,
) -> None:
    torch.manual_seed(0)

    def made(count: int) -> Tensor:
        x = torch.randn(rows, length, count, width).to(dtype).transpose(1, 2)
        return (x if inside_tokens else x.contiguous()).requires_grad_()

    q, k, v, grad = made(heads), made(groups), made(groups), made(heads).detach()
    segments, scale = documents(rows, length, mean), width**-0.5
    out, lse = kernels.attention(q, k, v, segments, causal, scale, window)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = plain(*exact, segments, causal, scale, window)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    assert lse.shape == (rows, heads, length) and torch.isfinite(lse).all()
    assert not far(out, wanted, 0.004)
    for a, b in zip(found, gradients, strict=True):
        assert a.shape == b.shape
        assert not far(a, b, 0.006) or float(b.norm()) < 1e-6  # one key: scores have no gradient


@pytest.mark.parametrize(("heads", "groups", "width"), [(3, 3, 64), (4, 2, 32)])
@pytest.mark.parametrize("rotations", [0, 1, 2])
@pytest.mark.parametrize("biased", [True, False])
@by_types
def test_joined_attention_rotates_and_has_one_gradient(
    dtype: torch.dtype, heads: int, groups: int, width: int, rotations: int, biased: bool
) -> None:
    torch.manual_seed(4)
    length, size = 150, (heads + 2 * groups) * width
    product = torch.randn(2, length, size).to(dtype).requires_grad_()
    grad, segments = torch.randn(2, length, heads * width).to(dtype), documents(2, length, 40)
    angles = torch.rand(max(rotations, 1), length, width // 2) * 7
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1) for turn in (torch.cos, torch.sin))
    rotation = (cos, sin) if rotations else (None, None)
    bias = (torch.randn(size) / 4).requires_grad_() if biased else None
    out, lse = kernels.joined_attention(product, bias, heads, width, *rotation, segments, True, 0.2)
    inputs = [product, bias] if biased else [product]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    every = sum(exact).view(2, length, -1, width).transpose(1, 2)
    q, k, v = every.tensor_split([heads, heads + groups], dim=1)
    if rotations:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wanted = plain(q, k, v, segments, True, 0.2, 0).transpose(1, 2).flatten(2)
    assert lse.shape == (2, heads, length)
    assert not far(out, wanted, 0.005)
    found, expected = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())
    for a, b in zip(found, expected, strict=True):
        assert not far(a.to(dtype), b, 0.006)


def test_an_embeddings_gradient_is_summed_by_rows() -> None:
    grad, ids = torch.randn(60, 32), torch.randint(0, 20, (60,))
    for padding in (-1, 3):
        table = torch.zeros(20, 32, requires_grad=True)
        wanted = F.embedding(ids, table, padding_idx=None if padding < 0 else padding)
        (exact,) = torch.autograd.grad(wanted, table, grad)
        torch.testing.assert_close(pointwise.embedding_gradient(grad, ids, 20, padding), exact)


@by_types
def test_a_sequence_without_segments_is_one_document(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 2, 150, 64).to(dtype) for _ in range(3))
    whole = kernels.attention(q, k, v, None, True, 0.1, 0)[0]
    assert torch.equal(whole, kernels.attention(q, k, v, torch.ones(2, 150), True, 0.1, 0)[0])
    assert not far(whole, plain(q.double(), k.double(), v.double(), None, True, 0.1, 0), 0.004)


@by_types
def test_a_changed_document_moves_no_other(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 300, 64).to(dtype) for _ in range(3))
    segments = torch.arange(300)[None] // 70
    inside = (segments == 2)[0]
    before, _ = kernels.attention(q, k, v, segments, False, 0.1, 0)
    k[:, :, inside] += 1
    v[:, :, inside] += 1
    after, _ = kernels.attention(q, k, v, segments, False, 0.1, 0)
    assert torch.equal(before[:, :, ~inside], after[:, :, ~inside])
    assert not torch.equal(before[:, :, inside], after[:, :, inside])


@by_types
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 200, 64).to(dtype).requires_grad_() for _ in range(3))
    segments, before, found = documents(2, 200, 60), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, _ = kernels.attention(q, k, v, segments, True, 0.1, 0)
        found.append((out, *torch.autograd.grad(out.float().sum(), (q, k, v))))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@by_types
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 1, 64, 32).to(dtype) for _ in range(3))
    k[0, 0, 3, 5] = torch.nan
    out, _ = kernels.attention(q, k, v, torch.ones(1, 64), False, 0.1, 0)
    assert out.isnan().all()
    logits = torch.randn(2, 64).to(dtype)
    logits[0, 7] = torch.nan
    losses, correct = kernels.head_gradient(logits, None, torch.tensor([1, 2]))
    assert losses[0].isnan() and losses[1].isfinite() and correct[0] == 0


@pytest.mark.parametrize("vocabulary", [16, 1003, 30_528])
@pytest.mark.parametrize("bias", [True, False])
@by_types
def test_losses_of_the_head_and_their_gradient(dtype: torch.dtype, vocabulary: int, bias: bool) -> None:
    torch.manual_seed(1)
    logits, targets = (torch.randn(12, vocabulary) * 3).to(dtype), torch.randint(0, vocabulary, (12,))
    added = torch.randn(vocabulary) if bias else None
    targets[1], targets[2], logits[2, 5] = head.IGNORE, 5, 40
    exact = (logits.double() + (0 if added is None else added)).requires_grad_()
    wanted = F.cross_entropy(exact, targets, ignore_index=head.IGNORE, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    alone = (exact >= exact.amax(-1, keepdim=True)).sum(-1) == 1
    right = ((exact.argmax(-1) == targets) & alone).float()
    losses, correct = kernels.head_gradient(logits, added, targets)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, right) and correct[2] == 1
    assert not far(logits, gradient, 0.003) and not logits[1].any()


def test_exponentials_are_as_exact_as_said() -> None:
    """Of 0 down to what float32 holds in full: 2e-7 by the polynomial, and three roundings around it."""
    logits = -torch.rand(1000, 64) * 86
    logits[:, 0] = 0
    exact = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    kernels.head_gradient(logits, None, torch.zeros(1000, dtype=torch.int64))
    error = (logits.double() / exact - 1)[:, 1:].abs()
    assert error.max() < 4.5e-7
    nothing = torch.tensor([[0.0, -torch.inf, -200.0, -1e30] * 4])
    kernels.head_gradient(nothing, None, torch.tensor([0]))
    torch.testing.assert_close(nothing, torch.tensor([[-0.75, 0.0, 0.0, 0.0] + [0.25, 0.0, 0.0, 0.0] * 3]))
    assert not nothing[:, 1::4].any()


@by_types
def test_a_tie_is_no_right_answer(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 32, dtype=dtype)
    assert kernels.head_gradient(logits, None, torch.tensor([3]))[1].item() == 0


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match="target 32 is beyond a vocabulary of 32"):
        kernels.head_gradient(torch.zeros(2, 32), None, torch.tensor([1, 32]))


@by_types
def test_the_weights_gradient_is_turned_and_scaled(dtype: torch.dtype) -> None:
    product = torch.randn(33, 208).to(dtype)
    found = kernels.scaled_gradient(product, torch.tensor(0.37), 32)
    assert torch.equal(found, (product[:32].float() * 0.37).T) and found.is_contiguous()


@pytest.mark.parametrize("width", [64, 37])
@by_types
def test_gelu_and_its_gradients(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(2)
    product = (torch.randn(2, 50, width) * 3).to(dtype).requires_grad_()
    bias, grad = torch.randn(width, requires_grad=True), torch.randn(2, 50, width).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (product, bias)]
    wanted = F.gelu(exact[0] + exact[1])
    found = pointwise.gelu(product, bias)
    assert not far(found, wanted, 0.003)
    of_product, of_bias = torch.autograd.grad(found, (product, bias), grad)
    exact_product, exact_bias = torch.autograd.grad(wanted, exact, grad.double())
    assert not far(of_product, exact_product, 0.003)
    assert not far(of_bias.to(dtype), exact_bias, 0.003)


@by_types
def test_gelu_keeps_the_tails(dtype: torch.dtype) -> None:
    values = torch.tensor([[-1e4, -6.0, -0.0, 0.0, 6.0, 1e4]]).to(dtype)
    found = pointwise.gelu(values, torch.zeros(6))
    torch.testing.assert_close(found.float(), F.gelu(values.float()), rtol=0.01, atol=1e-6)


@by_types
def test_swiglu_and_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    product, grad = (torch.randn(2, 3, 154) * 4).to(dtype).requires_grad_(), torch.randn(2, 3, 77).to(dtype)
    exact = product.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted, found = F.silu(gate) * up, pointwise.swiglu(product)
    assert not far(found, wanted, 0.003)
    (ours,), (theirs,) = torch.autograd.grad(found, product, grad), torch.autograd.grad(wanted, exact, grad.double())
    assert not far(ours, theirs, 0.003)
    extreme = torch.tensor([[-1e4, 1e4, 1.0, 1.0]]).to(dtype)
    torch.testing.assert_close(pointwise.swiglu(extreme), torch.tensor([[0.0, 1e4]]).to(dtype))


@pytest.mark.parametrize("shape", [(3, 50), (70,)])
@by_types
def test_a_norm_around_a_layer_and_its_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    product = torch.randn(*shape, 64).to(dtype).requires_grad_()
    around, grad = torch.randn(*shape, 64, requires_grad=True), torch.randn(*shape, 64)
    bias, weight, shift = (torch.randn(64, requires_grad=True) for _ in range(3))
    inputs = (product, bias, around, weight, shift)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = F.layer_norm(exact[0] + exact[1] + exact[2], (64,), exact[3], exact[4], 1e-5)
    found, _ = pointwise.residual_norm(*inputs, 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert a.shape == b.shape
        assert not far(a, b, 0.003)


@pytest.mark.parametrize("shape", [(3, 50), (70,)])
@pytest.mark.parametrize("with_product", [True, False])
@by_types
def test_a_root_mean_square_norm_around_a_layer_and_its_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], with_product: bool
) -> None:
    torch.manual_seed(6)
    product = torch.randn(*shape, 64).to(dtype).requires_grad_() if with_product else None
    around, past = torch.randn(*shape, 64, requires_grad=True), torch.randn(*shape, 64)
    weight, grad = torch.randn(64, requires_grad=True), torch.randn(*shape, 64).to(dtype)
    inputs = [x for x in (product, around, weight) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    total, found = pointwise.rms_norm(product, around, weight, 1e-5, dtype)
    wanted = exact[0] + exact[1] if with_product else exact[0]
    normed = F.rms_norm(wanted, (64,), exact[-1], 1e-5)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-6)
    assert not far(found, normed, 0.002) and found.dtype == dtype
    ours = torch.autograd.grad((total, found), inputs, (past, grad))
    theirs = torch.autograd.grad((wanted, normed), exact, (past.double(), grad.double()))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert not far(a, b, 0.003)


@by_types
def test_operators_keep_torchs_contracts(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 20, 32).to(dtype).requires_grad_() for _ in range(3))
    vector, around = torch.randn(32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    wide, joined = (torch.randn(size).to(dtype).requires_grad_() for size in ((4, 32), (1, 20, 192)))
    bias = torch.randn(192, requires_grad=True)
    for operator, arguments in (
        (torch.ops.lmssl.native_attention.default, (q, k, v, torch.ones(1, 20), True, 0.3, 0)),
        (torch.ops.lmssl.joined_attention.default, (joined, None, 2, 32, None, None, torch.ones(1, 20), True, 0.3)),
        (torch.ops.lmssl.joined_attention.default, (joined, bias, 2, 32, None, None, None, False, 0.3)),
        (torch.ops.lmssl.embedding_gradient.default, (torch.randn(4, 32), torch.arange(4), 9, -1)),
        (
            torch.ops.lmssl.tied_gradient.default,
            (torch.randn(17, 32).to(dtype), torch.tensor(2.0), 16, torch.randn(4, 16), torch.arange(4), -1),
        ),
        (torch.ops.lmssl.residual_norm.default, (wide, vector, around, vector, vector, 1e-5)),
        (torch.ops.lmssl.rms_norm.default, (wide.detach(), around.detach(), vector.detach(), 1e-5, dtype)),
        (torch.ops.lmssl.gelu.default, (wide, torch.randn(32, requires_grad=True))),
        (torch.ops.lmssl.swiglu.default, (wide,)),
        (torch.ops.lmssl.scaled_gradient.default, (torch.randn(17, 32).to(dtype), torch.tensor(2.0), 16)),
        (torch.ops.lmssl.head_gradient.default, (torch.randn(4, 32).to(dtype), None, torch.arange(4))),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("documents_apart", [True, False])
@by_types
def test_document_attention_goes_through_the_kernel(dtype: torch.dtype, documents_apart: bool) -> None:
    q, k, v = (torch.randn(2, 2, 40, 32, requires_grad=True) for _ in range(3))
    segments, module = documents(2, 40, 9), nn.Module().train()
    calls: list[str] = []

    def attend(*qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            kwargs = document_kwargs(segments, causal=True, documents=documents_apart)
            return document_attention(module, *qkv, None, **kwargs)[0]

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    found = torch.compile(attend, backend=backend, dynamic=False)(q, k, v)
    assert any("native_attention" in call for call in calls)
    plain = attend(q, k, v)
    assert "native_attention" in str(plain.grad_fn.next_functions[0][0])
    assert torch.equal(plain, found)
    with native.without():
        stock = attend(q, k, v)
    assert not torch.equal(stock, found) and not far(found, stock.double(), 0.01)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), stock)  # evaluation is torch's
