"""Document attention: packed documents equal separate ones, and no document sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

import lmssl.model.build  # noqa: F401  registers the implementation
from lmssl.model import attention, products
from lmssl.model.attention import document_attention, document_kwargs

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen3": Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "qwen3-sliding": Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "gpt2": GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
LENGTHS = (5, 17, 1, 9)


@pytest.fixture(params=["mask", "loop"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(attention, "LOOP_FROM_TOKENS", 0 if request.param == "loop" else 10**9)
    return str(request.param)


def build(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("document")
    return model.eval()


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 128, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
    offsets = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, segments, offsets


def hidden(model: torch.nn.Module, ids: torch.Tensor, segments: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    kwargs = document_kwargs(segments, causal=True, documents=True)
    body = model.base_model(input_ids=ids, position_ids=offsets, attention_mask=None, use_cache=False, **kwargs)
    return body.last_hidden_state


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_documents_of_the_stock_model(name: str, path: str) -> None:
    model = build(CONFIGS[name])
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    ids, segments, offsets = packed()
    together = hidden(model, ids, segments, offsets)[0]
    start = 0
    for length in LENGTHS:
        alone = stock.base_model(input_ids=ids[:, start : start + length], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(together[start : start + length], alone, atol=2e-5, rtol=1e-4)
        start += length


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_document_moves_no_other(name: str, path: str) -> None:
    model = build(CONFIGS[name])
    ids, segments, offsets = packed()
    before = hidden(model, ids, segments, offsets)
    changed = torch.where(segments == 2, (ids + 1) % 128, ids)
    after = hidden(model, changed, segments, offsets)
    elsewhere = (segments != 2)[0]
    assert torch.equal(before[0][elsewhere], after[0][elsewhere])
    assert not torch.allclose(before[0][~elsewhere], after[0][~elsewhere])


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_do_not_move_earlier_ones(name: str, path: str) -> None:
    model = build(CONFIGS[name])
    ids, segments, offsets = packed()
    changed = ids.clone()
    changed[0, 15] += 1
    before, after = hidden(model, ids, segments, offsets), hidden(model, changed % 128, segments, offsets)
    assert torch.equal(before[0, :15], after[0, :15])


def test_loop_and_mask_have_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, segments, offsets = packed()
    found = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(attention, "LOOP_FROM_TOKENS", threshold)
        model = build(CONFIGS["llama"]).double()
        hidden(model, ids, segments, offsets).square().sum().backward()
        found.append([p.grad for p in model.base_model.parameters()])
    for by_loop, by_mask in zip(*found, strict=True):
        torch.testing.assert_close(by_loop, by_mask, atol=1e-6, rtol=1e-6)  # rotary angles stay float32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2, 3, 8, 100])
def test_windows_in_the_loop_are_those_of_a_mask(window: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_QUERIES", 4)
    _, segments, _ = packed()
    segments = torch.cat([segments, segments.flip(1)])
    found = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(attention, "LOOP_FROM_TOKENS", threshold)
        torch.manual_seed(0)
        tensors = [torch.randn(2, 2, sum(LENGTHS), 8, requires_grad=True) for _ in range(3)]
        kwargs = document_kwargs(segments, causal=causal, documents=True)
        out, _ = document_attention(torch.nn.Module(), *tensors, None, sliding_window=window, **kwargs)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for by_loop, by_mask in zip(*found, strict=True):
        torch.testing.assert_close(by_loop, by_mask, atol=1e-5, rtol=1e-5)


def test_no_piece_of_a_windowed_document_meets_all_of_it() -> None:
    segments = torch.ones((1, 4096), dtype=torch.int64)
    pieces = list(attention._pieces(segments, False, 65))
    assert sum((p.end_query - p.first_query) * (p.end_key - p.first_key) for p in pieces) < 4096 * 4096 / 8
    assert sum(p.end_query - p.first_query for p in pieces) == 4096


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_without_documents_compiles(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        module = torch.nn.Module()
        return document_attention(module, query, key, value, None, sliding_window=2, document_causal=causal)[0]

    compiled = torch.compile(attend, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))


@pytest.mark.parametrize("window", [0, 3])
def test_loop_operator_is_sound(window: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 12, 8, requires_grad=True) for _ in range(3))
    segments = torch.tensor([[1] * 5 + [2] * 7, [1] * 12])
    torch.library.opcheck(torch.ops.lmssl.document_loop.default, (query, key, value, segments, True, 0.3, window))


def test_padding_only_rows_stay_finite(path: str) -> None:
    model = build(CONFIGS["llama"])
    zeros = torch.zeros((1, 16), dtype=torch.int64)
    assert torch.isfinite(hidden(model, zeros, zeros, zeros)).all()


def test_without_documents_the_whole_sequence_is_seen() -> None:
    model = build(CONFIGS["llama"])
    ids, segments, _ = packed()
    kwargs = document_kwargs(segments, causal=True, documents=False)
    ours = model.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    torch.testing.assert_close(
        ours, stock.base_model(input_ids=ids, use_cache=False).last_hidden_state, atol=2e-5, rtol=1e-4
    )


def test_sliding_window_counts_the_query_itself() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 6, 4) for _ in range(3))
    index = torch.arange(6)
    allowed = (index[:, None] >= index[None, :]) & (index[:, None] - index[None, :] < 2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    kwargs = document_kwargs(torch.ones((1, 6), dtype=torch.int64), causal=True, documents=True)
    got, _ = document_attention(torch.nn.Module(), query, key, value, None, sliding_window=2, **kwargs)
    torch.testing.assert_close(got.transpose(1, 2), expected)
