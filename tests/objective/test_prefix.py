"""Prefix language modelling: how long prefixes are, what sees what, and the loss of each document alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl.data.batch import SequenceBatch
from lmssl.model import products
from lmssl.model.head import IGNORE
from lmssl.objective.module import LossModule
from lmssl.objective.prefix import PrefixObjective, prefix_kwargs
from sequences import packed, segments_of

LLAMA = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
SURFACE = np.ones(97, np.int64)


def objective(low: float = 0.0, high: float = 1.0) -> PrefixObjective:
    return PrefixObjective(SURFACE, 7, low, high)


def model_of(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    model.set_attn_implementation(attention)
    return model


def stock_loss(model: PreTrainedModel, batch: SequenceBatch, prefix_BT: np.ndarray) -> torch.Tensor:
    """Each segment alone through the stock class, with the prefix as an explicit mask of eager attention."""
    total = torch.zeros(())
    for row, _, places in segments_of(batch):
        ids, size = torch.from_numpy(batch.ids_BT[row, places])[None], len(places)
        start = int(prefix_BT[row, places].sum())
        seen = torch.ones(size, size).tril()
        seen[:start, :start] = 1.0
        mask = torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
    return total


def test_targets_are_what_follows_the_prefix() -> None:
    batch = packed([6, 3, 1], length=12)
    micro = objective(0.5, 0.5 + 1e-9).prepare(batch)
    ids = batch.ids_BT[0].tolist()
    none = [IGNORE]
    assert micro.inputs["prefix_BT"][0].nonzero()[:, 0].tolist() == [0, 1, 2, 6, 9]
    assert micro.inputs["targets_BT"][0].tolist() == [*none * 2, *ids[3:6], *none, *ids[7:9], *none * 4]
    assert micro.counts == {"prefix": 5, "accuracy": 5}
    assert micro.num_bytes == pytest.approx(30 * 5 / 10)
    assert micro.num_padding_tokens == 2


def test_empty_rows_have_no_targets() -> None:
    micro = objective().prepare(packed([], []))
    assert micro.counts == {"prefix": 0, "accuracy": 0}
    assert micro.num_bytes == 0


def test_shares_are_uniform_between_the_ratios() -> None:
    drawn = objective(0.2, 0.6)
    shares = []
    for first in range(0, 400, 20):
        batch = packed(*[[500, 500]] * 20, length=1000, position=first)
        prefix_BT = drawn.prefixes(batch.segments_BT, batch.positions_B, evaluation=False)
        shares += [prefix_BT[row, places].mean() for row, _, places in segments_of(batch)]
    assert 0.198 <= min(shares) < 0.21
    assert 0.59 < max(shares) <= 0.6
    # 800 uniform draws: quarters hold 200 each, standard deviation 12
    assert all(abs(n - 200) < 60 for n in np.histogram(shares, bins=4, range=(0.2, 0.6))[0])


def test_at_least_one_token_on_either_side() -> None:
    batch = packed([2, 3, 4, 5] * 4, length=60)
    for low, high in ((0.0, 0.001), (0.999, 1.0)):
        prefix_BT = objective(low, high).prefixes(batch.segments_BT, batch.positions_B, evaluation=False)
        for row, _, places in segments_of(batch):
            wanted = 1 if high < 0.5 else len(places) - 1
            assert prefix_BT[row, places].tolist() == [True] * wanted + [False] * (len(places) - wanted)


def test_prefixes_depend_on_seed_position_and_segment_alone() -> None:
    drawn = objective()
    whole = packed(*[[20, 30, 40]] * 6, length=100)
    prefix_BT = drawn.prefixes(whole.segments_BT, whole.positions_B, evaluation=False)
    again = drawn.prefixes(whole.segments_BT[4:], whole.positions_B[4:], evaluation=False)
    assert (again == prefix_BT[4:]).all()
    fewer = packed([20, 30], length=100)  # position 0 with a segment less
    assert (drawn.prefixes(fewer.segments_BT, fewer.positions_B, evaluation=False)[0, :50] == prefix_BT[0, :50]).all()
    lengths = prefix_BT[:, :20].sum(1)
    assert len(set(lengths.tolist())) > 2
    held_out = drawn.prefixes(whole.segments_BT, whole.positions_B, evaluation=True)
    assert (held_out != prefix_BT).any()
    assert (held_out == drawn.prefixes(whole.segments_BT, whole.positions_B, evaluation=True)).all()
    other = PrefixObjective(SURFACE, 8).prefixes(whole.segments_BT, whole.positions_B, evaluation=False)
    assert (other != prefix_BT).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_equals_the_stock_loss_of_each_document(name: str) -> None:
    batch = packed([5, 11, 2], [24], [7, 9])
    micro = objective().prepare(batch)
    model, stock = model_of(name, "document"), model_of(name, "eager")
    found = LossModule(model, objective(), bf16=False)(micro.inputs)
    total = stock_loss(stock, batch, micro.inputs["prefix_BT"].numpy())
    torch.testing.assert_close(found["prefix"], total, rtol=1e-5, atol=1e-5)
    assert 0 <= float(found["accuracy"]) <= micro.counts["accuracy"]
    wanted = torch.autograd.grad(total, list(stock.parameters()))
    found["prefix"].backward()
    for got, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_who_sees_whom(name: str) -> None:
    """Change one token at a time and watch which hidden states move."""
    batch = packed([6, 7], length=16)
    micro = objective(0.5, 0.5 + 1e-9).prepare(batch)
    model = model_of(name, "document").eval()
    prefix, segments = micro.inputs["prefix_BT"][0], micro.inputs["segments_BT"][0]

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        kwargs = prefix_kwargs(micro.inputs["segments_BT"], micro.inputs["prefix_BT"])
        return model.base_model(
            input_ids=ids, position_ids=micro.inputs["offsets_BT"], use_cache=False, **kwargs
        ).last_hidden_state[0]

    with torch.no_grad():
        before = hidden(micro.inputs["ids_BT"])
        for changed in range(13):
            ids = micro.inputs["ids_BT"].clone()
            ids[0, changed] = (ids[0, changed] + 1) % 97
            moved = ((hidden(ids) - before).abs().amax(-1) > 1e-7).tolist()
            same = segments == segments[changed]
            wanted = same & (prefix[changed] | (torch.arange(16) >= changed))
            assert moved == wanted.tolist(), changed


def test_long_sequences_on_cpu_keep_their_prefixes() -> None:
    """Documents alone would be looped over from this length on, which knows no prefix."""
    batch = packed([700, 900], length=1600)
    micro = objective().prepare(batch)
    model = model_of("llama", "document")
    with torch.no_grad():
        found = LossModule(model, objective(), bf16=False)(micro.inputs)
        total = stock_loss(model_of("llama", "eager"), batch, micro.inputs["prefix_BT"].numpy())
    torch.testing.assert_close(found["prefix"], total, rtol=1e-5, atol=1e-3)


def test_it_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)  # tested with the compiler on its own
    batch = packed([5, 11, 2], [24])
    inputs = objective().prepare(batch).inputs
    module = LossModule(model_of("llama", "document"), objective(), bf16=False)
    eager = module(inputs)
    compiled = torch.compile(module, backend="aot_eager", dynamic=False, fullgraph=True)(inputs)
    torch.testing.assert_close(compiled["prefix"], eager["prefix"], rtol=1e-5, atol=1e-5)
    compiled["prefix"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_objective_travels_to_loader_workers() -> None:
    travelled = pickle.loads(pickle.dumps(objective()))
    batch = packed([5, 11, 2], [24])
    torch.testing.assert_close(travelled.prepare(batch).inputs, objective().prepare(batch).inputs)
