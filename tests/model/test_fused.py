"""Stock layers with pieces that training steps compute otherwise: the same losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kinds import tiny
from lmssl.model import native
from lmssl.model.attention import document_kwargs
from lmssl.model.build import build_model
from lmssl.model.encoder import encode, masked_head
from lmssl.model.fused import fuse_layers
from lmssl.model.layers import recompute_layers

needs_kernels = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")
needs_bf16 = pytest.mark.skipif(not native.processor_can(torch.bfloat16), reason="no AVX-512 for bfloat16")

IDS = torch.arange(20, 52)[None].repeat(2, 1)
SEGMENTS = (torch.arange(32)[None] // 11 + 1).repeat(2, 1).int()
OFFSETS = (torch.arange(32)[None] % 11).repeat(2, 1)

WIDE = {"hidden_size": 64, "num_attention_heads": 2}
"""Heads of 32, which the kernels take."""
KINDS = {
    "bert": WIDE,
    "roberta": WIDE,
    "xlm-roberta": WIDE,
    "camembert": WIDE,
    "electra": WIDE,
    "eurobert": WIDE | {"num_key_value_heads": 1, "head_dim": 32},
    "distilbert": {"dim": 64, "n_heads": 2},
    "modernbert": WIDE,
    "llama": WIDE | {"num_key_value_heads": 1, "head_dim": 32},
    "qwen3": WIDE | {"num_key_value_heads": 1, "head_dim": 32},
}


CAUSAL = ("llama", "qwen3")


def made(kind: str) -> PreTrainedModel:
    return tiny(kind, objective="causal" if kind in CAUSAL else "masked", **KINDS[kind])


def hidden(model: PreTrainedModel, ids: Tensor, *, rounded: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        if model.config.model_type in CAUSAL:
            kwargs = document_kwargs(SEGMENTS, causal=True, documents=True)
            body = model.base_model(input_ids=ids, position_ids=OFFSETS, use_cache=False, **kwargs)
            found: Tensor = body.last_hidden_state
            return found
        return encode(model, ids, SEGMENTS, OFFSETS)


def gradients(model: PreTrainedModel, run: Callable[..., Tensor], *, rounded: bool = True) -> dict[str, Tensor]:
    out, weights = run(model, IDS, rounded=rounded), dict(model.named_parameters())
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((out.double() * probe).sum(), list(weights.values()), allow_unused=True)
    return {"out": out} | {n: g for n, g in zip(weights, found, strict=True) if g is not None}


@needs_kernels
@pytest.mark.parametrize("rounded", [False, pytest.param(True, marks=needs_bf16)])
@pytest.mark.parametrize(("kind", "recomputed"), [*((kind, False) for kind in KINDS), ("bert", True), ("llama", True)])
def test_our_pieces_compute_what_the_stock_ones_do(kind: str, recomputed: bool, rounded: bool) -> None:
    assert native.load()
    model = made(kind)
    with native.without():
        exact = gradients(copy.deepcopy(model).double(), hidden, rounded=False)
    if recomputed:
        recompute_layers(model, 1)
        model.train()
    with native.without():
        plain = gradients(model, hidden, rounded=rounded)
        fuse_layers(model)
        again = gradients(model, hidden, rounded=rounded)
    assert all(torch.equal(plain[name], again[name]) for name in plain)  # no kernels are in use: nothing changes
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = gradients(model, torch.compile(hidden, backend=backend, dynamic=False), rounded=rounded)
    assert any("attention" in name for name in seen)
    whole = float(torch.stack([g.norm() for name, g in exact.items() if name != "out"]).norm())
    for fused in (compiled, gradients(model, hidden, rounded=rounded)):
        assert not all(torch.equal(fused[name], plain[name]) for name in plain)
        for name, wanted in exact.items():
            ours, theirs = (float((found[name] - wanted).detach().norm()) for found in (fused, plain))
            noise = 1e-3 if rounded else 1e-6
            assert ours < 1.2 * theirs + noise * whole, name  # as near to exact as what is rounded anyway


@needs_kernels
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_what_comes_before_the_output_embedding(kind: str) -> None:
    assert native.load()
    model = made(kind)
    fuse_layers(model)
    transform, states = masked_head(model).transform, torch.randn(30, 64)

    def run(states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return transform(states)

    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    found = torch.compile(run, backend=backend, dynamic=False)(states)
    assert any("lmssl.gelu" in name for name in seen)
    torch.testing.assert_close(found.float(), transform(states), rtol=0.03, atol=0.03)


@needs_kernels
def test_a_copy_has_weights_of_its_own() -> None:
    assert native.load()
    model = made("bert")
    fuse_layers(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch._dynamo.reset()
    with native.without():
        wanted = hidden(made("bert"), IDS)
    torch.testing.assert_close(hidden(copied, IDS), wanted, rtol=0.05, atol=0.05)
    found = torch.compile(hidden, backend="eager", dynamic=False)(copied, IDS)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@needs_kernels
def test_which_pieces_are_ours() -> None:
    assert native.load()
    for kind, expected in (
        ("bert", {"joined_attention", "gelu"}),
        ("llama", {"joined_attention", "swiglu", "rms_norm"}),
        ("qwen3", {"native_attention", "swiglu", "rms_norm"}),
        ("modernbert", {"native_attention"}),
    ):
        model, seen = made(kind), set[str]()
        fuse_layers(model)

        def backend(graph: torch.fx.GraphModule, _: object, seen: set[str] = seen) -> object:
            parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
            seen.update(str(node.target) for part in parts for node in part.graph.nodes)
            return graph

        torch._dynamo.reset()
        torch.compile(hidden, backend=backend, dynamic=False, fullgraph=True)(model, IDS)
        for name in ("joined_attention", "native_attention", "gelu", "swiglu", "rms_norm"):
            assert any(f"lmssl.{name}" in target for target in seen) == (name in expected), (kind, name, seen)


def test_names_of_weights_stay() -> None:
    model = tiny("bert")
    before = list(model.state_dict())
    fuse_layers(model)
    assert list(model.state_dict()) == before


def test_dropout_stays_with_torch() -> None:
    if not native.load():
        pytest.skip("the processor has no AVX2")
    model = tiny("bert", **WIDE, attention_probs_dropout_prob=0.2).train()
    fuse_layers(model)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(hidden, backend=backend, dynamic=False)(model, IDS)
    assert not any("joined_attention" in name or "native_attention" in name for name in seen)


@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=needs_kernels)])
def test_in_evaluation_nothing_changes(loaded: bool) -> None:
    config = made("llama").config
    stock, fused = build_model(config, seed=1), build_model(config, seed=1)
    if loaded:
        assert native.load()
    fuse_layers(fused)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=IDS, use_cache=False).logits for model in (stock, fused)))
        assert torch.equal(*(hidden(model, IDS) for model in (stock, fused)))
