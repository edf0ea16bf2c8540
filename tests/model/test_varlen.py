"""Document attention by lists of starts: what the kernels are told, and that it says what a mask says."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen as torch_varlen
from transformers import AutoModelForCausalLM, LlamaConfig

from kinds import MASKED, tiny
from lmssl.model import varlen
from lmssl.model.attention import document_attention, document_kwargs
from lmssl.model.encoder import encode
from lmssl.model.varlen import can_attend, document_starts
from lmssl.objective.base import MicroBatch
from lmssl.objective.causal import CausalObjective

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = ((5, 17, 1, 9), (32,), (10, 20, 2))
LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
WIDER: dict[str, dict[str, Any]] = {"distilbert": {"dim": 64}} | {
    kind: {"hidden_size": 64} for kind in MASKED if kind != "distilbert"
}
"""Heads of 16, which the kernels take."""
NAMES = ["llama", *MASKED]


def segments() -> torch.Tensor:
    """[3, 32]; the last row ends with padding."""
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in LENGTHS]
    found = torch.from_numpy(np.stack(rows))
    found[2, 30:] = 0
    return found.to(torch.int32)


def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's `varlen_attn` promises, by its documentation, one document after another."""
    assert query.dtype == torch.bfloat16 and query.shape[0] == max(cu_seq_q) and torch.equal(cu_seq_q, cu_seq_k)
    assert int(cu_seq_q.diff().max()) <= max_q == max_k and cu_seq_q.dtype == torch.int32
    shared = query.shape[1] // key.shape[1]
    out = torch.full_like(query, torch.nan)
    left, right = window_size
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        if start == end:
            continue
        apart = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = torch.ones_like(apart, dtype=torch.bool)
        seen &= (apart <= left) | (left < 0)
        seen &= (-apart <= right) | (right < 0)
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        out[start:end] = found[0].transpose(0, 1)
    return out


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts `stand_in` in the kernel's place; counts its calls."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    return calls


def test_the_stand_in_takes_what_torch_takes() -> None:
    ours = inspect.signature(stand_in).parameters
    theirs = inspect.signature(torch_varlen.varlen_attn).parameters
    for name in ours:
        if name != "enable_gqa":  # of newer versions
            assert theirs[name].kind == ours[name].kind and theirs[name].default == ours[name].default
    assert bool(varlen._SHARED_KEYS) == ("enable_gqa" in theirs)


def test_starts_are_where_documents_or_padding_begin() -> None:
    starts = document_starts(segments()).tolist()
    assert starts[:9] == [0, 5, 22, 23, 32, 64, 74, 94, 96]
    assert set(starts[9:]) == {96} and len(starts) == 96 // 8 + 1


@pytest.mark.parametrize(("length", "num_starts"), [(512, 8), (256, 16), (255, 64), (17, 512), (3, 2048), (1, 2048)])
def test_few_sizes_hold_any_number_of_documents(length: int, num_starts: int) -> None:
    made = torch.arange(2048)[None] // length % 2 + 1
    starts = document_starts(made)
    assert (
        len(starts) in {2048 // tokens + 1 for tokens in varlen.DOCUMENT_TOKENS} and len(starts) <= 4 * num_starts + 1
    )
    assert len(starts) <= max(2048 // 64, 2 * num_starts) + 1, "memory of the backward pass goes by it"
    assert torch.equal(starts.unique(), torch.tensor([*range(0, 2048, length), 2048]))


def attend(window: int | None, causal: bool, starts: torch.Tensor | None, heads: int) -> list[torch.Tensor]:
    """Output and gradients under autocast."""
    device = "cpu" if starts is None else starts.device.type
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, heads, 32, 16), (3, 2, 32, 16), (3, 2, 32, 16))
    tensors = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    with torch.autocast(device, dtype=torch.bfloat16):
        kwargs = document_kwargs(segments().to(device), causal=causal, documents=True, starts_K=starts)
        assert (kwargs.get("document_starts") is None) == (starts is None)
        out, _ = document_attention(torch.nn.Module(), *tensors, None, sliding_window=window, **kwargs)
    # Padding's own numbers mean nothing, and nothing depends on them.
    kept = (segments() != 0).to(device)[:, :, None, None]
    return [out * kept, *torch.autograd.grad((out.float() * kept).square().sum(), tensors)]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 8, 100])
def test_what_the_kernel_is_told_is_what_a_mask_says(
    kernel: list[int], window: int | None, causal: bool, heads: int
) -> None:
    found = attend(window, causal, document_starts(segments()), heads)
    assert kernel
    for by_starts, by_mask in zip(found, attend(window, causal, None, heads), strict=True):
        torch.testing.assert_close(by_starts, by_mask, atol=0.03, rtol=0.03)


def body(model: Any, ids: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """Hidden states at tokens that are no padding, float32."""
    made = segments().to(ids.device)
    offsets = torch.cat([torch.arange(n) for row in LENGTHS for n in row]).reshape(3, 32).to(ids.device)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16), torch.no_grad():
        if model.config.model_type in MASKED:
            hidden = encode(model, ids, made, offsets, starts_K=starts)
        else:
            kwargs = document_kwargs(made, causal=True, documents=True, starts_K=starts)
            hidden = model.base_model(input_ids=ids, position_ids=offsets, use_cache=False, **kwargs).last_hidden_state
    return hidden.float()[made != 0]


def build(name: str) -> Any:
    if name in MASKED:
        return tiny(name, **WIDER[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA)
    model.set_attn_implementation("document")
    return model.eval()


def some_ids() -> torch.Tensor:
    """Ordinary tokens of all vocabularies here."""
    return torch.randint(8, 100, (3, 32), generator=torch.Generator().manual_seed(1))


def no_leak(model: Any, ids: torch.Tensor, starts: torch.Tensor) -> None:
    """A changed document moves itself and no other."""
    made = segments().to(ids.device)
    before = body(model, ids, starts)
    for row, number in ((0, 1), (0, 3), (1, 1), (2, 2)):
        chosen = (made == number) & (torch.arange(3, device=ids.device)[:, None] == row)
        after = body(model, torch.where(chosen, 8 + (ids - 7) % 92, ids), starts)
        of_it = chosen[made != 0]
        assert torch.equal(before[~of_it], after[~of_it])
        assert not torch.equal(before[of_it], after[of_it])


@pytest.mark.parametrize("name", NAMES)
def test_models_by_starts_are_those_by_masks_and_leak_nothing(kernel: list[int], name: str) -> None:
    model, ids = build(name), some_ids()
    starts = document_starts(segments())
    torch.testing.assert_close(body(model, ids, starts), body(model, ids, None), atol=0.05, rtol=0.05)
    assert len(kernel) == model.config.num_hidden_layers
    no_leak(model, ids, starts)


def test_what_the_kernels_do_not_take_goes_by_a_mask(kernel: list[int]) -> None:
    assert not can_attend(torch.zeros(1, 1, 4, 12, dtype=torch.bfloat16))
    assert not can_attend(torch.zeros(1, 1, 4, 16)) and can_attend(torch.zeros(1, 1, 4, 16).half())
    starts = document_starts(segments())
    assert "document_starts" not in document_kwargs(segments(), causal=True, documents=True, starts_K=starts)  # float32
    tensors = [torch.randn(3, 2, 32, 12) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kwargs = document_kwargs(segments(), causal=True, documents=True, starts_K=starts)
        out, _ = document_attention(torch.nn.Module(), *tensors, None, **kwargs)
        kwargs = document_kwargs(segments(), causal=True, documents=True)
        expected, _ = document_attention(torch.nn.Module(), *tensors, None, **kwargs)
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)
    assert not kernel


def test_new_documents_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", torch.library.custom_op("lmssl_test::varlen", _opaque, mutates_args=()))
    torch.library.register_fake("lmssl_test::varlen", lambda query, *_, **__: torch.empty_like(query))
    model = build("llama")
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend="eager")
    ids = torch.randint(0, 128, (3, 32))
    starts = document_starts(segments())
    body(model, ids, starts)
    with torch.compiler.set_stance("fail_on_recompile"):
        moved = torch.where((starts > 0) & (starts < 96), starts + 1, starts)
        body(model, ids, moved)


def _opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return query.clone()


@pytest.mark.gpu
@GPU
def test_a_micro_batch_on_a_gpu_brings_its_starts() -> None:
    micro = MicroBatch({"segments_BT": segments()}, {}, 0.0, 0)
    assert torch.equal(micro.on(torch.device("cuda"))["document_starts"].cpu(), document_starts(segments()))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 8, 100])
def test_the_kernels_do_what_a_mask_says(window: int | None, causal: bool, heads: int) -> None:
    starts = document_starts(segments()).cuda()
    for by_kernel, by_mask in zip(
        attend(window, causal, starts, heads), attend(window, causal, None, heads), strict=True
    ):
        torch.testing.assert_close(by_kernel.cpu(), by_mask, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_leak_nothing(name: str) -> None:
    ids = some_ids()
    model, starts = build(name), document_starts(segments())
    by_mask = body(model, ids, None)
    model.cuda()
    torch.testing.assert_close(body(model, ids.cuda(), starts.cuda()).cpu(), by_mask, atol=0.05, rtol=0.05)
    no_leak(model, ids.cuda(), starts.cuda())


def test_a_micro_batch_on_cpu_brings_none() -> None:
    assert set(MicroBatch({"segments_BT": segments()}, {}, 0.0, 0).on(torch.device("cpu"))) == {"segments_BT"}


def test_the_objective_hands_its_starts_to_the_model(kernel: list[int]) -> None:
    model, made = build("llama"), segments()
    ids = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(1))
    targets = torch.where(made != 0, ids, -100)
    inputs = {"ids_BT": ids, "segments_BT": made, "offsets_BT": torch.arange(32).expand(3, 32), "targets_BT": targets}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_mask = CausalObjective().sums(model, inputs)["causal"]
        assert not kernel
        by_starts = CausalObjective().sums(model, {**inputs, "document_starts": document_starts(made)})["causal"]
        joined = CausalObjective(document_attention=False)
        whole = joined.sums(model, {**inputs, "document_starts": document_starts(made)})["causal"]
    assert len(kernel) == 2
    assert by_starts.item() == pytest.approx(by_mask.item(), rel=1e-3)
    assert whole.item() == pytest.approx(joined.sums(model, inputs)["causal"].item(), rel=1e-2)
