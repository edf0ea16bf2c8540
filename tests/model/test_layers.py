"""Layers that compute their inside again: the same gradients, fewer numbers kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinds import MASKED, SPAN, tiny
from lmssl.model.encoder import encode, encode_decode
from lmssl.model.layers import layer_stacks, recompute_layers
from lmssl.train.launch import can_compile, compile_module

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "qwen3": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "distilbert": {"dropout": 0.1},
    "modernbert": {"mlp_dropout": 0.1},
    "eurobert": {"attention_dropout": 0.1},
    **{kind: {"hidden_dropout_prob": 0.1} for kind in ("bert", "roberta", "electra")},
    **{kind: {"dropout_rate": 0.1} for kind in SPAN},
}


class Body(nn.Module):
    """A model's hidden states under document attention, summed against fixed numbers."""

    def __init__(self, model: nn.Module, objective: str) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
        model: Any = self.model
        offsets_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        if self.objective == "span":
            hidden = encode_decode(model, ids_BT, segments_BT, ids_BT[:, :8], segments_BT[:, :8])
        elif self.objective == "masked":
            hidden = encode(model, ids_BT, segments_BT, offsets_BT)
        else:
            hidden = model.base_model(input_ids=ids_BT, position_ids=offsets_BT, use_cache=False).last_hidden_state
        weights = torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)
        return (hidden * weights).sum()


def body(kind: str) -> Body:
    objective = "causal" if kind in CAUSAL else "span" if kind in SPAN else "masked"
    change = {**CAUSAL, **DROPOUT}[kind]
    if kind == "gpt2":
        change = change | {"n_embd": 32, "n_layer": 3, "n_head": 4}
    model = tiny(kind, objective=objective, **change) if kind != "gpt2" else _gpt2(change)
    return Body(model.train(), objective)


def _gpt2(change: dict[str, Any]) -> Any:
    from lmssl.model.build import build_config, build_model
    from lmssl.recipe.model import Gpt2Model

    section = Gpt2Model.model_validate({"kind": "gpt2", **change})
    return build_model(build_config(section, vocab_size=101, sequence_length=40, tokenizer=None), seed=1)


def batch() -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(8, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    segments_BT = torch.ones_like(ids_BT)
    segments_BT[:, 13:] = 2
    return ids_BT, segments_BT


def gradients(module: Body) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and bytes that the forward pass kept for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(*batch())
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    named = zip(dict(module.named_parameters()), found, strict=True)
    return {n: g for n, g in named if g is not None}, sum(size for at, size in kept.items() if at not in weights)


@pytest.mark.parametrize("kind", [*CAUSAL, *MASKED, *SPAN])
def test_gradients_are_equal_bit_for_bit_and_less_is_kept(kind: str) -> None:
    """With dropout; in evaluation nothing is recomputed."""
    module = body(kind)
    names = set(module.state_dict())
    plain, kept = gradients(module)
    count = recompute_layers(module, 1)
    assert count == sum(map(len, layer_stacks(module)))
    again, less = gradients(module)
    assert set(module.state_dict()) == names
    assert again.keys() == plain.keys()
    assert all(again[name].equal(gradient) for name, gradient in plain.items())
    assert less < 0.5 * kept
    _, evaluated = gradients(module.eval())
    assert evaluated > less


def test_every_so_many_layers_keep_so_much() -> None:
    def kept(every: int | None) -> tuple[Mapping[str, Tensor], int]:
        model = tiny("llama", objective="causal", num_hidden_layers=6).train()
        module = Body(model, "causal")
        assert every is None or recompute_layers(module, every) == -(-6 // every)
        return gradients(module)

    bytes_of = {every: kept(every)[1] for every in (None, 3, 2, 1)}
    assert bytes_of[1] < bytes_of[2] < bytes_of[3] < bytes_of[None]
    layer = (bytes_of[None] - bytes_of[1]) / 6
    assert bytes_of[2] == pytest.approx(bytes_of[None] - 3 * layer, rel=0.02)
    assert all(kept(2)[0][name].equal(gradient) for name, gradient in kept(None)[0].items())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # while tracing
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["layers", "model"])
def test_compiled_it_gives_the_same_gradients(mode: Any) -> None:
    """Without dropout, whose numbers a compiler draws otherwise."""
    torch._dynamo.reset()
    model = tiny("llama", objective="causal").train()
    plain, _ = gradients(Body(model, "causal"))
    module = Body(model, "causal")
    recompute_layers(module, 1)
    compile_module(module, mode)
    compiled, _ = gradients(module)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
