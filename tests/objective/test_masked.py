"""Masked-token prediction: the stock loss of each document, counts, bytes, and what one stream means."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForMaskedLM

from lmssl.data.batch import SequenceBatch
from lmssl.model.build import build_config, build_model
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.masked import MaskedObjective, masked_bytes
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule
from lmssl.recipe.model import ModelSection
from lmssl.recipe.objective import MaskedObjective as Section
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS = {
    "bert": SIZES,
    "roberta": SIZES,
    "modernbert": SIZES | {"local_attention": 8},
    "electra": SIZES | {"embedding_size": 16},
    "eurobert": SIZES,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 2},
}
LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


@pytest.fixture(scope="module")
def objective(tokenizer: Tokenizer) -> MaskedObjective:
    masking = Masking.of(Section(kind="masked"), tokenizer, 7, 1000)
    return MaskedObjective(masking, surface_bytes(tokenizer))


def batch(*rows: list[int]) -> SequenceBatch:
    """Rows of documents of the given lengths between [CLS] (2) and [SEP] (3), padded."""
    ids = np.zeros((len(rows), LENGTH), np.int64)
    segments, offsets = np.zeros((len(rows), LENGTH), np.int32), np.zeros((len(rows), LENGTH), np.int64)
    random = np.random.default_rng(0)
    for row, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths):
            ids[row, at : at + n] = [2, *random.integers(5, 8000, n - 2), 3]
            segments[row, at : at + n] = number + 1
            offsets[row, at : at + n] = np.arange(n)
            at += n
    positions = np.array([row if lengths else -1 for row, lengths in enumerate(rows)])
    return SequenceBatch(ids, segments, offsets, positions, np.array([float(3 * sum(r)) for r in rows]))


def whole_labels(micro: MicroBatch) -> torch.Tensor:
    """Targets at their places, as stock classes take labels; shape [B, T]."""
    labels = torch.full_like(micro.inputs["ids_BT"], IGNORE)
    for row, (places, targets) in enumerate(
        zip(micro.inputs["places_BC"].tolist(), micro.inputs["targets_BC"].tolist(), strict=True)
    ):
        for place, target in zip(places, targets, strict=True):
            if target != IGNORE:
                labels[row, place] = target
    return labels


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_equals_the_stock_loss_of_each_document(
    kind: str, tokenizer: Tokenizer, objective: MaskedObjective
) -> None:
    section = TypeAdapter(ModelSection).validate_python({"kind": kind, **KINDS[kind]})
    config = build_config(section, vocab_size=8192, sequence_length=LENGTH, tokenizer=tokenizer, objective="masked")
    model = build_model(config, objective="masked", seed=1)
    stock = AutoModelForMaskedLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    packed = batch([12, 20, 5], [LENGTH], [9, 30])
    micro = objective.prepare(packed)
    assert micro.counts["masked"] == micro.counts["accuracy"] > 20
    sums = LossModule(model, objective, bf16=False)(micro.inputs)
    labels, total, correct = whole_labels(micro), torch.zeros(()), 0
    for row in range(3):
        for number in range(1, int(packed.segments_BT[row].max()) + 1):
            place = torch.from_numpy(packed.segments_BT[row] == number)
            ids, wanted = micro.inputs["ids_BT"][row][place][None], labels[row][place][None]
            if (wanted != IGNORE).any():
                out = stock(input_ids=ids, labels=wanted)
                total = total + out.loss * (wanted != IGNORE).sum()
                correct += int(((out.logits.argmax(-1) == wanted) & (wanted != IGNORE)).sum())
    torch.testing.assert_close(sums["masked"], total, rtol=1e-5, atol=1e-4)
    assert int(sums["accuracy"]) == correct
    named = dict(stock.named_parameters())
    wanted_grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    sums["masked"].backward()
    for parameter, expected in zip(model.parameters(), wanted_grads, strict=True):
        got = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, rtol=1e-3, atol=2e-5)


def test_targets_are_hidden_and_the_rest_is_left(objective: MaskedObjective) -> None:
    packed = batch([12, 20], [LENGTH])
    micro = objective.prepare(packed)
    labels = whole_labels(micro).numpy()
    assert (labels[labels != IGNORE] == packed.ids_BT[labels != IGNORE]).all()
    kept = labels == IGNORE
    assert (micro.inputs["ids_BT"].numpy()[kept] == packed.ids_BT[kept]).all()
    assert micro.num_padding_tokens == 8


def test_a_batch_without_targets_is_harmless(tokenizer: Tokenizer, objective: MaskedObjective) -> None:
    section = TypeAdapter(ModelSection).validate_python({"kind": "bert", **SIZES})
    config = build_config(section, vocab_size=8192, sequence_length=LENGTH, tokenizer=tokenizer, objective="masked")
    model = build_model(config, objective="masked", seed=1)
    micro = objective.prepare(batch([], []))
    assert micro.counts == {"masked": 0, "accuracy": 0} and micro.num_bytes == 0.0
    sums = LossModule(model, objective, bf16=False)(micro.inputs)
    assert float(sums["masked"].detach()) == 0.0
    sums["masked"].backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all() and (p.grad == 0).all()) for p in model.parameters())


def test_held_out_text_has_masks_of_its_own(objective: MaskedObjective) -> None:
    packed = batch([LENGTH] * 1, *([[LENGTH]] * 63))
    first, again = (objective.prepare(packed, evaluation=True) for _ in range(2))
    training = objective.prepare(packed)
    assert torch.equal(first.inputs["ids_BT"], again.inputs["ids_BT"])
    assert first.counts["masked"] == pytest.approx(0.15 * 64 * 38, rel=0.03)
    assert training.counts["masked"] == pytest.approx(0.3 * 64 * 38, rel=0.03)


def test_bytes_of_the_masked_text(tokenizer: Tokenizer) -> None:
    """A row's bytes are shared out among its tokens by their length; control tokens have none."""
    vocabulary = tokenizer.backend.get_vocab()
    table = surface_bytes(tokenizer)
    word, tail = "the", next(t for t in vocabulary if t.startswith("##") and len(t) == 5)
    ids = np.array([[2, vocabulary[word], vocabulary[tail], 3, 0]])
    segments = np.array([[1, 1, 1, 1, 0]], dtype=np.int32)
    packed = SequenceBatch(ids, segments, np.arange(5)[None], np.array([0]), np.array([12.0]))
    assert table[[2, vocabulary[word], vocabulary[tail], 3]].tolist() == [0, 3, 3, 0]
    assert masked_bytes(packed, np.array([[vocabulary[tail], IGNORE]]), table).tolist() == [6.0]
    assert masked_bytes(packed, np.array([[IGNORE, IGNORE]]), table).tolist() == [0.0]


def test_it_travels_to_loader_workers(objective: MaskedObjective) -> None:
    packed = batch([12, 20], [LENGTH])
    there = pickle.loads(pickle.dumps(objective))
    assert torch.equal(there.prepare(packed).inputs["ids_BT"], objective.prepare(packed).inputs["ids_BT"])
    one_stream = dataclasses.replace(objective, document_attention=False).prepare(packed)
    assert one_stream.inputs["offsets_BT"][0].tolist() == list(range(LENGTH))
