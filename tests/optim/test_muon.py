"""Muon in one process: its update by hand, the gate, projections, momentum, states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from lmssl.optim.groups import build_optimizer, parameter_roles, set_rates
from lmssl.optim.muon import UPDATE_RMS, MuonWithAdamW
from lmssl.optim.orthogonal import orthogonal_factors
from lmssl.recipe.optim import AdamW, Muon

SECTION = Muon(kind="muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1, momentum=0.9)
GPT2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2)


def give_gradients(module: nn.Module, seed: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=numbers)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def by_hand(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Muon's steps over one matrix, in float32."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = 0.9 * average + 0.1 * gradient
        ahead = 0.1 * gradient + 0.9 * average
        update = orthogonal_factors(ahead[None])[0] * 0.2 * math.sqrt(max(weight.shape))
        weight = weight - lr * 0.1 * weight - lr * update
    return weight


@pytest.mark.parametrize("gated", [False, True])
def test_two_steps_are_those_by_hand(gated: bool) -> None:
    module = model()
    optimizer: Any = build_optimizer(module, SECTION, bf16=False)
    before, gradients = weights(module), []
    for seed in (1, 2):
        gradients.append(give_gradients(module, seed))
        if gated:
            optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    after = weights(module)
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(after[name], by_hand(before[name], [g[name] for g in gradients], 0.02))
    name = "transformer.h.0.attn.c_attn.weight"
    for part in range(3):  # columns: Conv1D is transposed
        columns = slice(16 * part, 16 * part + 16)
        expected = by_hand(before[name][:, columns], [g[name][:, columns] for g in gradients], 0.02)
        torch.testing.assert_close(after[name][:, columns], expected)


def test_everything_else_is_updated_by_adamw() -> None:
    ours, theirs = model(), model()
    optimizer = build_optimizer(ours, SECTION)
    plain = build_optimizer(theirs, AdamW(kind="adamw", lr=0.003, weight_decay=0.1))
    for seed in (1, 2):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        set_rates(optimizer.param_groups, ratio=0.7, momentum=0.9)
        set_rates(plain.param_groups, ratio=0.7, momentum=None)
        optimizer.step()
        plain.step()
    expected = weights(theirs)
    for name, role in parameter_roles(ours).items():
        assert torch.equal(weights(ours)[name], expected[name]) == (role != "matrix"), name


@pytest.mark.parametrize("bf16", [False, True])
def test_updates_have_the_size_of_adamw(bf16: bool) -> None:
    module = model()
    optimizer = build_optimizer(module, Muon(kind="muon", lr=0.02, weight_decay=0.0), bf16=bf16)
    before = weights(module)
    give_gradients(module, 1)
    optimizer.step()
    for name, role in parameter_roles(module).items():
        if role == "matrix":
            moved = (weights(module)[name] - before[name]).square().mean().sqrt() / 0.02
            assert moved == pytest.approx(UPDATE_RMS, rel=0.1), name


def test_the_gate_leaves_every_bit() -> None:
    module = model()
    optimizer: Any = build_optimizer(module, SECTION)
    give_gradients(module, 1)
    optimizer.step()
    before = weights(module)
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    give_gradients(module, 2)
    next(p for n, p in module.named_parameters() if "c_fc.weight" in n).grad[0, 0] = math.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(module).items())
    assert all(torch.equal(value, states[p][key]) for p, s in optimizer.state.items() for key, value in s.items())
    give_gradients(module, 3)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(module).items() if "weight" in name)


def test_states_are_float32_and_one_for_a_matrix() -> None:
    module = model()
    optimizer = build_optimizer(module, SECTION)
    give_gradients(module, 1)
    optimizer.step()
    for name, role in parameter_roles(module).items():
        state = optimizer.state[module.get_parameter(name)]
        assert set(state) == ({"momentum"} if role == "matrix" else {"exp_avg", "exp_avg_sq", "step"})
        assert all(value.dtype == torch.float32 for value in state.values())


def test_momentum_follows_its_group() -> None:
    module = model()
    optimizer = build_optimizer(module, SECTION)
    set_rates(optimizer.param_groups, ratio=1.0, momentum=0.5)
    gradients = give_gradients(module, 1)
    optimizer.step()
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(optimizer.state[module.get_parameter(name)]["momentum"], gradients[name] * 0.5)


def test_weights_without_gradient_stay() -> None:
    module = model()
    optimizer = build_optimizer(module, SECTION)
    before = weights(module)
    give_gradients(module, 1)
    name = "transformer.h.0.mlp.c_fc.weight"
    module.get_parameter(name).grad = None
    optimizer.step()
    changed = {n for n, weight in weights(module).items() if not torch.equal(weight, before[n])}
    assert name not in changed and "transformer.h.0.mlp.c_proj.weight" in changed


def test_many_small_rounds_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for limit in (2**28, 1):
        monkeypatch.setattr("lmssl.optim.muon._MOST_ELEMENTS", limit)
        module = model()
        optimizer = build_optimizer(module, SECTION, bf16=False)
        assert isinstance(optimizer, MuonWithAdamW)
        give_gradients(module, 1)
        optimizer.step()
        found.append(weights(module))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight)
