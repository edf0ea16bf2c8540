"""The hybrid objective: which positions are masked, who sees whom, and the stock loss of each document in each mode."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl.data.batch import SequenceBatch
from lmssl.errors import TokenizerError
from lmssl.model import products
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.hybrid import HybridObjective
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule
from lmssl.recipe.objective import HybridObjective as Section
from lmssl.tokenizer.load import load_tokenizer
from sequences import packed, segments_of

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def masking(root: Path) -> Masking:
    return Masking.of(Section(kind="hybrid"), load_tokenizer(root / "tokenizer/wordpiece-8k"), 7, 1000)


@pytest.fixture(scope="module")
def objective(masking: Masking) -> HybridObjective:
    return HybridObjective(masking, 7, 0.5)


def batch_of(*rows: list[int], length: int = 40, position: int = 0) -> SequenceBatch:
    return packed(*rows, length=length, first=100, vocab_size=8000, position=position)


def model_of(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG))
    model.set_attn_implementation(attention)
    return model


def stock_losses(batch: SequenceBatch, micro: MicroBatch, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Each segment alone through the stock class: its own labels, or `is_causal=False` and labels at masked tokens."""
    total = {"causal": torch.zeros(()), "masked": torch.zeros(())}
    for row, _, places in segments_of(batch):
        read = micro.inputs["ids_BT"][row, places][None]
        masked = bool(micro.inputs["masked_B"][row])
        labels = torch.full((1, batch.ids_BT.shape[1]), IGNORE)
        if masked:
            kept = micro.inputs["masked_BC"][row] != IGNORE
            labels[0, micro.inputs["places_BC"][row, kept] + 1] = micro.inputs["masked_BC"][row, kept]
        else:
            labels = torch.from_numpy(batch.ids_BT[row])[None]
        labels = labels[:, places]
        model.config.is_causal = not masked
        logits = model(input_ids=read, use_cache=False).logits[0]
        total["masked" if masked else "causal"] += F.cross_entropy(
            logits[:-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum"
        )
    return total


def test_any_run_of_positions_has_its_share_of_masked_ones(masking: Masking) -> None:
    for ratio in (0.5, 0.9375, 0.3333, 0.01):
        found = HybridObjective(masking, 7, ratio).is_masked(np.arange(100_000, 110_000))
        for size in (1, 7, 64, 1000, 10_000):
            counts = found[: 10_000 // size * size].reshape(-1, size).sum(1)
            assert abs(counts - size * ratio).max() < 1
        other = HybridObjective(masking, 8, ratio).is_masked(np.arange(100_000, 110_000))
        assert ratio == 0.5 or (other != found).any()
    far = HybridObjective(masking, 7, 0.123456789012345).is_masked(np.array([2**62, 2**62 + 1]))
    assert far.shape == (2,)


def test_targets_of_either_kind(objective: HybridObjective) -> None:
    batch = batch_of([20, 9], [29], [20, 9], [29])
    micro = objective.prepare(batch)
    masked_B = micro.inputs["masked_B"].numpy()
    assert masked_B.sum() == 2
    assert objective.weights == {"causal": 0.5, "masked": 0.5}
    for row in range(4):
        causal, masked = micro.inputs["causal_BT"][row].numpy(), micro.inputs["masked_BC"][row].numpy()
        ids, read = batch.ids_BT[row], micro.inputs["ids_BT"][row].numpy()
        if masked_B[row]:
            assert (causal == IGNORE).all()
            kept = masked != IGNORE
            places = micro.inputs["places_BC"][row].numpy()[kept]
            assert 5 <= kept.sum() <= 9  # 30 % of 29, without what fell on first tokens
            assert (ids[places + 1] == masked[kept]).all()
            assert (batch.segments_BT[row, places] == batch.segments_BT[row, places + 1]).all()
            unhidden = np.setdiff1d(np.arange(40), places + 1)
            assert (read[unhidden] == ids[unhidden]).all()
        else:
            assert (read == ids).all()
            assert (masked == IGNORE).all()
            follows = batch.segments_BT[row, 1:] == batch.segments_BT[row, :-1]
            follows &= batch.segments_BT[row, 1:] > 0
            assert (causal[:-1] == np.where(follows, ids[1:], IGNORE)).all()
    assert micro.counts["causal"] == micro.counts["causal_accuracy"] == 2 * (27 if masked_B[1] else 28)
    assert micro.counts["masked"] == int((micro.inputs["masked_BC"] != IGNORE).sum())
    assert micro.num_bytes == batch.num_bytes_B[~masked_B].sum()


def test_held_out_sequences_are_read_in_both_modes(objective: HybridObjective) -> None:
    batch = batch_of([20, 9], [29], [12])
    micro = objective.prepare(batch, evaluation=True)
    assert micro.inputs["masked_B"].tolist() == [False] * 3 + [True] * 3
    assert micro.counts["causal"] == 27 + 28 + 11
    assert 5 <= micro.counts["masked"] <= 14
    assert micro.num_bytes == batch.num_bytes_B.sum()
    again = objective.prepare(batch, evaluation=True)
    torch.testing.assert_close(again.inputs, micro.inputs, rtol=0, atol=0)


def test_empty_rows_have_no_targets(objective: HybridObjective) -> None:
    micro = objective.prepare(batch_of([], []))
    assert set(micro.counts.values()) == {0}
    assert micro.num_bytes == 0


def test_packed_loss_equals_the_stock_loss_of_each_document(objective: HybridObjective) -> None:
    batch = batch_of([20, 9, 2], [40], [17, 23], [30, 9])
    micro = objective.prepare(batch)
    model, stock = model_of("document"), model_of("sdpa")
    found = LossModule(model, objective, bf16=False)(micro.inputs)
    total = stock_losses(batch, micro, stock)
    for term in ("causal", "masked"):
        assert micro.counts[term] > 10
        torch.testing.assert_close(found[term], total[term], rtol=1e-5, atol=1e-5)
        assert 0 <= float(found[f"{term}_accuracy"]) <= micro.counts[term]
    weighted = sum(w * total[t] / micro.counts[t] for t, w in objective.weights.items())
    wanted = torch.autograd.grad(weighted, list(stock.parameters()))
    sum(w * found[t] / micro.counts[t] for t, w in objective.weights.items()).backward()
    for got, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=1e-4, atol=1e-6)


def test_who_sees_whom(objective: HybridObjective) -> None:
    """Documents never see each other; within one, masked sequences are read both ways and the others from the left."""
    batch = batch_of([6, 7], [6, 7], length=16)
    inputs = objective.prepare(batch).inputs
    model = model_of("document").eval()
    seen: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state))
    with torch.no_grad():
        objective.sums(model, inputs)
        for changed in range(13):
            ids = inputs["ids_BT"].clone()
            ids[:, changed] += 1
            objective.sums(model, inputs | {"ids_BT": ids})
            for row in range(2):
                moved = (seen[-1][row] - seen[0][row]).abs().amax(-1) > 1e-7
                wanted = inputs["segments_BT"][row] == inputs["segments_BT"][row, changed]
                if not inputs["masked_B"][row]:
                    wanted = wanted & (torch.arange(16) >= changed)
                assert moved.tolist() == wanted.tolist(), (row, changed)


def test_it_compiles_as_one_graph(objective: HybridObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)  # tested with the compiler on its own
    inputs = objective.prepare(batch_of([20, 9, 2], [40])).inputs
    module = LossModule(model_of("document"), objective, bf16=False)
    eager = module(inputs)
    compiled = torch.compile(module, backend="aot_eager", dynamic=False, fullgraph=True)(inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)
    sum(compiled[term] for term in objective.weights).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_objective_travels_to_loader_workers(objective: HybridObjective) -> None:
    travelled = pickle.loads(pickle.dumps(objective))
    batch = batch_of([20, 9, 2], [40])
    torch.testing.assert_close(travelled.prepare(batch).inputs, objective.prepare(batch).inputs, rtol=0, atol=0)


def test_a_tokenizer_without_a_mask_token(root: Path) -> None:
    with pytest.raises(TokenizerError, match="mask token") as caught:
        Masking.of(Section(kind="hybrid"), load_tokenizer(root / "tokenizer/bpe-4k"), 7, 1000)
    assert "mask_token" in str(caught.value.remedy)
