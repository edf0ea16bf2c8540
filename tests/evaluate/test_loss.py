"""Evaluation is exact: the same sums for any batch size, and those of the stock model document by document."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl.data.batch import SequenceBatch
from lmssl.evaluate.loss import LossResult, evaluate_loss
from lmssl.objective.base import MicroBatch
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    attention_dropout=0.5,
)
DOCUMENTS = [[7, 9], [16], [3, 4, 5], [2, 2, 2, 2]]


def packed() -> SequenceBatch:
    ids, segments, offsets = np.zeros((4, 16), np.int64), np.zeros((4, 16), np.int32), np.zeros((4, 16), np.int64)
    random = np.random.default_rng(0)
    for row, lengths in enumerate(DOCUMENTS):
        at = 0
        for number, length in enumerate(lengths):
            ids[row, at : at + length] = random.integers(0, 61, length)
            segments[row, at : at + length] = number + 1
            offsets[row, at : at + length] = np.arange(length)
            at += length
    return SequenceBatch(ids, segments, offsets, np.arange(4), np.array([40.0, 50.0, 30.0, 20.0]))


def rows(batch: SequenceBatch, start: int, stop: int) -> MicroBatch:
    part = slice(start, stop)
    return CausalObjective().prepare(
        SequenceBatch(
            batch.ids_BT[part],
            batch.segments_BT[part],
            batch.offsets_BT[part],
            batch.positions_B[part],
            batch.num_bytes_B[part],
        )
    )


def module() -> LossModule:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.set_attn_implementation("document")
    return LossModule(model, CausalObjective(), bf16=False).train()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_equals_the_stock_loss_of_every_document_for_any_batch_size(size: int) -> None:
    batch, ours = packed(), module()
    splits = {"a": [rows(batch, i, min(i + size, 4)) for i in range(0, 4, size)]}
    found = evaluate_loss(ours, CausalObjective(), splits, Accelerator(cpu=True))
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa").eval()
    nats, targets = 0.0, 0
    with torch.no_grad():
        for row in range(4):
            for number in range(1, len(DOCUMENTS[row]) + 1):
                ids = torch.from_numpy(batch.ids_BT[row][batch.segments_BT[row] == number])[None]
                nats += float(stock(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                targets += ids.shape[1] - 1
    assert found["a"].num_targets == targets
    assert found["a"].nats == pytest.approx(nats, rel=1e-5)
    assert found["a"].bits_per_byte == pytest.approx(nats / math.log(2) / 140, rel=1e-5)
    assert found[""] == found["a"]


def test_corpora_stand_apart_and_together() -> None:
    batch, ours = packed(), module()
    splits = {"a": [rows(batch, 0, 2)], "b": [rows(batch, 2, 4)]}
    found = evaluate_loss(ours, CausalObjective(), splits, Accelerator(cpu=True))
    assert found[""].nats == pytest.approx(found["a"].nats + found["b"].nats)
    assert found[""].num_targets == found["a"].num_targets + found["b"].num_targets
    assert found[""].num_bytes == 140.0


def test_what_stands_apart_does_not_count_in_the_whole() -> None:
    batch, ours = packed(), module()
    splits = {"a": [rows(batch, 0, 2)], "b": [rows(batch, 2, 4)]}
    found = evaluate_loss(ours, CausalObjective(), splits, Accelerator(cpu=True), apart={"b"})
    assert found[""] == found["a"]
    assert found["b"].num_bytes == 50.0


def test_leaves_the_module_as_it_was_and_keeps_no_gradients() -> None:
    ours = module()
    evaluate_loss(ours, CausalObjective(), {"a": [rows(packed(), 0, 4)]}, Accelerator(cpu=True))
    assert ours.training
    assert all(p.grad is None for p in ours.parameters())


def test_nothing_to_divide_by_is_no_number() -> None:
    for nothing in (LossResult(0.0, 0, 0.0), LossResult(0.0, 0, 7.0), LossResult(math.nan, 3, 7.0)):
        assert nothing.loss is None
        assert nothing.bits_per_byte is None
    assert LossResult(3.0, 2, 0.0).loss == 1.5
    assert LossResult(3.0, 2, 0.0).bits_per_byte is None
