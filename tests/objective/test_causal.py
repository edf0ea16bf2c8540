"""Next-token prediction: targets, counts, and the stock loss on packed documents."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def batch(*rows: list[int], length: int = 24) -> SequenceBatch:
    """Rows of documents of the given lengths, padded; ids are arbitrary."""
    ids = np.zeros((len(rows), length), np.int64)
    segments = np.zeros((len(rows), length), np.int32)
    offsets = np.zeros((len(rows), length), np.int64)
    random = np.random.default_rng(0)
    for row, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths):
            ids[row, at : at + n] = random.integers(1, 97, n)
            segments[row, at : at + n] = number + 1
            offsets[row, at : at + n] = np.arange(n)
            at += n
    return SequenceBatch(ids, segments, offsets, np.arange(len(rows)), np.array([float(3 * sum(r)) for r in rows]))


def test_the_last_token_of_a_document_predicts_nothing() -> None:
    micro = CausalObjective().prepare(batch([3, 2], length=8))
    ids = micro.inputs["ids_BT"][0].tolist()
    assert micro.inputs["targets_BT"][0].tolist() == [ids[1], ids[2], IGNORE, ids[4], IGNORE, IGNORE, IGNORE, IGNORE]
    assert micro.counts == {"causal": 3}
    assert (micro.num_bytes, micro.num_padding_tokens) == (15.0, 3)


def test_one_stream_predicts_across_documents_but_not_into_padding() -> None:
    micro = CausalObjective(document_attention=False).prepare(batch([3, 2], length=8))
    ids = micro.inputs["ids_BT"][0].tolist()
    assert micro.inputs["targets_BT"][0].tolist() == [*ids[1:5], IGNORE, IGNORE, IGNORE, IGNORE]
    assert micro.inputs["offsets_BT"][0].tolist() == list(range(8))


def test_empty_rows_have_no_targets() -> None:
    micro = CausalObjective().prepare(batch([], []))
    assert micro.counts == {"causal": 0}
    assert micro.num_padding_tokens == 48
    # Rows beyond the batch are no sequences: how many there are follows from the number of ranks.
    nothing = replace(batch([3], []), positions_B=np.array([0, -1]))
    assert CausalObjective().prepare(nothing).num_padding_tokens == 24 - 3


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_equals_the_stock_loss_of_each_document(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.set_attn_implementation("document")
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    packed = batch([5, 11, 2], [24], [7, 9])
    micro = CausalObjective().prepare(packed)
    ours = LossModule(model, CausalObjective(), bf16=False)(micro.inputs)["causal"]
    total = torch.zeros(())
    for row in range(3):
        for number in range(1, int(packed.segments_BT[row].max()) + 1):
            document = torch.from_numpy(packed.ids_BT[row][packed.segments_BT[row] == number])[None]
            total = total + stock(input_ids=document, labels=document, use_cache=False).loss * (document.shape[1] - 1)
    torch.testing.assert_close(ours, total, rtol=1e-5, atol=1e-4)
    wanted = torch.autograd.grad(total, list(stock.parameters()))
    ours.backward()
    for got, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=1e-3, atol=2e-5)


def test_the_objective_travels_to_loader_workers() -> None:
    objective = pickle.loads(pickle.dumps(CausalObjective(document_attention=False)))
    assert objective == CausalObjective(document_attention=False)
