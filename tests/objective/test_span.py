"""Span corruption: T5's spans and their statistics, rows of examples, and the stock loss of each example alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    UMT5Config,
)

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl.data.batch import SequenceBatch
from lmssl.errors import TokenizerError
from lmssl.model import products
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.module import LossModule
from lmssl.objective.span import LEVELS, Corruption, SpanObjective, capacities
from lmssl.recipe.objective import SpanObjective as Section
from lmssl.tokenizer.load import load_tokenizer
from sequences import packed, segments_of

PAD, EOS, FIRST = 0, 1, 120
SENTINELS = tuple(range(100, 120))
CORRUPTION = Corruption(7, 0.15, 3.0, SENTINELS, EOS, PAD)
OBJECTIVE = SpanObjective(CORRUPTION, (np.arange(200) >= FIRST).astype(np.int64))
SIZES = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
CONFIGS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(**SIZES, **SPECIAL),
    "t5-1.1": T5Config(**SIZES, **SPECIAL, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": MT5Config(**SIZES, **SPECIAL, feed_forward_proj="gated-gelu"),
    "umt5": UMT5Config(**SIZES, **SPECIAL, feed_forward_proj="gated-gelu"),
}


def batch_of(*rows: list[int], length: int = 64, position: int = 0) -> SequenceBatch:
    return packed(*rows, length=length, first=FIRST, vocab_size=200, position=position)


def model_of(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(copy.deepcopy(CONFIGS[name]))
    for part in model.modules():  # as build_model does, because transformers 5.17 forgets the stacks of T5
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(attention)
    return model


def stock_loss(model: PreTrainedModel, batch: SequenceBatch, micro: MicroBatch) -> torch.Tensor:
    """Each example alone through the stock class, which shifts its labels to the right itself."""
    total, inputs = torch.zeros(()), micro.inputs
    for row, number, places in segments_of(batch):
        if len(places) > 1:
            ids = inputs["ids_BE"][row, inputs["segments_BE"][row] == number][None]
            labels = inputs["targets_BO"][row, inputs["segments_BO"][row] == number][None]
            total = total + model(input_ids=ids, labels=labels).loss * labels.shape[1]
    return total


def t5_mask(length: int, random: np.random.Generator) -> np.ndarray:
    """T5's random_spans_noise_mask, written down from its source, for texts of two tokens and more."""
    num_noise = min(max(round(length * 0.15), 1), length - 1)
    num_spans = max(round(num_noise / 3.0), 1)

    def segmentation(num_items: int) -> np.ndarray:
        first = np.concatenate([[0], random.permutation(np.arange(num_items - 1) < num_spans - 1)])
        return np.bincount(np.cumsum(first))

    interleaved = np.stack([segmentation(length - num_noise), segmentation(num_noise)], axis=1).reshape(-1)
    starts = np.zeros(length, int)
    starts[np.cumsum(interleaved)[:-1]] = 1
    return np.cumsum(starts) % 2 == 1


@pytest.mark.parametrize("length", [2, 3, 9, 10, 20, 37, 64, 100])
def test_spans_are_distributed_as_t5s(length: int) -> None:
    """Exact counts for every draw, and the same frequency of hiding at each place."""
    random, count = np.random.default_rng(0), 3000
    ours, theirs = np.zeros(length), np.zeros(length)
    for _ in range(count):
        hidden, reference = CORRUPTION.hidden(length, random.random(length)) > 0, t5_mask(length, random)
        assert hidden.sum() == reference.sum()
        assert (
            np.diff(hidden.astype(int), prepend=0).clip(0).sum()
            == np.diff(reference.astype(int), prepend=0).clip(0).sum()
        )
        assert not hidden[0]
        assert hidden[-1]
        ours, theirs = ours + hidden, theirs + reference
    assert abs(ours - theirs).max() / count < 0.06  # five standard deviations of a difference of two frequencies


def test_lengths_of_spans_are_of_a_random_partition() -> None:
    """Of 12 hidden tokens in 4 spans, the first has length n in C(11 - n, 2) of C(11, 3) partitions."""
    found = [CORRUPTION.hidden(80, np.random.default_rng(i).random(80)) for i in range(2000)]
    assert CORRUPTION.spans(80) == (12, 4)
    first = np.bincount([(spans == 1).sum() for spans in found], minlength=10)
    for n in range(1, 10):
        share = math.comb(11 - n, 2) / math.comb(11, 3)
        assert abs(first[n] / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)


def test_examples_rebuild_the_text() -> None:
    """Sentinels count from the first; putting what they stand for in their place gives the text again."""
    for length in (2, 5, 30, 64):
        text = np.arange(FIRST, FIRST + length)
        source, answer = CORRUPTION.example(
            text, CORRUPTION.hidden(length, np.random.default_rng(length).random(length))
        )
        assert (len(source), len(answer)) == CORRUPTION.lengths(length)
        assert source[-1] == answer[-1] == EOS
        num_spans = CORRUPTION.spans(length).num_spans
        marks = [token for token in source.tolist() if token in SENTINELS]
        assert marks == [token for token in answer.tolist() if token in SENTINELS] == list(SENTINELS[:num_spans])
        assert answer[0] == SENTINELS[0]
        stands_for: dict[int, list[int]] = {}
        for token in answer[:-1].tolist():
            if token in SENTINELS:
                last = stands_for.setdefault(token, [])
            else:
                last.append(token)
        rebuilt = [part for token in source[:-1].tolist() for part in stands_for.get(token, [token])]
        assert rebuilt == text.tolist()


def test_few_sentinels_and_dense_spans_are_bounded() -> None:
    few = Corruption(7, 0.15, 3.0, SENTINELS[:2], EOS, PAD)
    assert few.spans(100) == (15, 2)
    dense = Corruption(7, 0.9, 1.0, SENTINELS, EOS, PAD)
    assert dense.spans(10) == (9, 1)
    assert (dense.hidden(10, np.random.default_rng(0).random(10)) == [0, *[1] * 9]).all()


def test_rows_of_examples() -> None:
    batch = batch_of([20, 1, 9], [64], [])
    micro = OBJECTIVE.prepare(batch)
    inputs = {name: tensor.numpy() for name, tensor in micro.inputs.items()}
    assert (inputs["ids_BE"].shape[1], inputs["read_BO"].shape[1]) in capacities(CORRUPTION, 64)
    for row, number, places in segments_of(batch):
        source = inputs["ids_BE"][row, inputs["segments_BE"][row] == number]
        answer = inputs["targets_BO"][row, inputs["segments_BO"][row] == number]
        read = inputs["read_BO"][row, inputs["segments_BO"][row] == number]
        assert (len(source), len(answer)) == CORRUPTION.lengths(len(places))
        if len(places) > 1:
            assert read.tolist() == [PAD, *answer[:-1].tolist()]
            kept = source[source >= FIRST].tolist() + answer[answer >= FIRST].tolist()
            assert sorted(kept) == sorted(batch.ids_BT[row, places].tolist())
    outside = inputs["segments_BO"] == 0
    assert (inputs["targets_BO"][outside] == IGNORE).all()
    assert (inputs["read_BO"][outside] == PAD).all()
    assert (inputs["ids_BE"][inputs["segments_BE"] == 0] == PAD).all()
    num_targets = sum(CORRUPTION.lengths(n)[1] for n in (20, 9, 64))
    assert micro.counts == {"span": num_targets, "accuracy": num_targets}
    # 3 of 20 tokens, none of 1, 1 of 9; 10 of 64
    assert micro.num_bytes == pytest.approx(90 * 4 / 30 + 3 * 64 * 10 / 64)


def test_spans_depend_on_seed_position_and_segment_alone() -> None:
    batch = batch_of(*[[30, 34]] * 4)
    whole = OBJECTIVE.prepare(batch).inputs
    part = SequenceBatch(*(getattr(batch, name)[2:] for name in SequenceBatch.__dataclass_fields__))
    for name, tensor in OBJECTIVE.prepare(part).inputs.items():
        assert (tensor == whole[name][2:]).all()
    assert len({tuple(row) for row in whole["targets_BO"].tolist()}) == 4
    held_out = OBJECTIVE.prepare(batch, evaluation=True).inputs
    assert (held_out["ids_BE"] != whole["ids_BE"]).any()
    torch.testing.assert_close(OBJECTIVE.prepare(batch, evaluation=True).inputs, held_out, rtol=0, atol=0)
    alone = OBJECTIVE.prepare(
        SequenceBatch(
            batch.ids_BT,
            np.where(batch.segments_BT == 1, 1, 0).astype(np.int32),
            batch.offsets_BT,
            batch.positions_B,
            batch.num_bytes_B,
        )
    ).inputs
    first = CORRUPTION.lengths(30)[0]
    assert (alone["ids_BE"][:, :first] == whole["ids_BE"][:, :first]).all()


@pytest.mark.parametrize(
    "corruption",
    [CORRUPTION, Corruption(1, 0.5, 1.0, SENTINELS, EOS, PAD), Corruption(1, 0.5, 20.0, SENTINELS, EOS, PAD)],
    ids=["t5", "short", "long"],
)
def test_no_packing_goes_beyond_the_last_capacity(corruption: Corruption) -> None:
    """The longest rows that any cut of a sequence gives, found by dynamic programming."""
    for tokens in (8, 9, 63, 64, 100):
        levels = capacities(corruption, tokens)
        assert list(levels) == sorted(levels)
        for side in (0, 1):
            longest = [0, 0]
            for total in range(2, tokens + 1):
                longest.append(max(longest[total - n] + corruption.lengths(n)[side] for n in range(1, total + 1)))
            assert max(longest) <= levels[-1][side]
            if corruption is CORRUPTION and tokens % 2 == 0:
                assert max(longest) == levels[-1][side]  # and not a token more than needed


def test_few_shapes_and_nothing_dropped() -> None:
    rows = {0: [[64]], 1: [[8] * 8], 2: [[2] * 32, [64]], 3: [[1] * 64]}
    shapes = set()
    for lengths in rows.values():
        batch = batch_of(*lengths)
        micro = OBJECTIVE.prepare(batch)
        shapes.add((micro.inputs["ids_BE"].shape[1], micro.inputs["read_BO"].shape[1]))
        assert micro.counts["span"] == sum(CORRUPTION.lengths(n)[1] for row in lengths for n in row)
    assert shapes == set(capacities(CORRUPTION, 64))
    assert len(shapes) == len(LEVELS)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_equals_the_stock_loss_of_each_example(name: str) -> None:
    batch = batch_of([20, 1, 9, 30], [64], [], [2, 3, 50])
    micro = OBJECTIVE.prepare(batch)
    model, stock = model_of(name, "document"), model_of(name, "eager")
    found = LossModule(model, OBJECTIVE, bf16=False)(micro.inputs)
    total = stock_loss(stock, batch, micro)
    torch.testing.assert_close(found["span"], total, rtol=1e-5, atol=1e-5)
    assert 0 <= float(found["accuracy"]) <= micro.counts["accuracy"]
    wanted = torch.autograd.grad(total, list(stock.parameters()))
    found["span"].backward()
    for (parameter, got), expected in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=1e-3, atol=2e-5, msg=lambda m, p=parameter: f"{p}: {m}")


def test_long_sequences_on_cpu() -> None:
    """From a certain length on attention without biases is computed document by document."""
    batch = batch_of([1000, 100, 800], length=1900)
    micro = OBJECTIVE.prepare(batch)
    with torch.no_grad():
        found = LossModule(model_of("t5", "document"), OBJECTIVE, bf16=False)(micro.inputs)
        total = stock_loss(model_of("t5", "eager"), batch, micro)
    torch.testing.assert_close(found["span"], total, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_examples_do_not_see_each_other(name: str) -> None:
    """Change one example, in the encoder or in the decoder, and watch the hidden states of all."""
    inputs = OBJECTIVE.prepare(batch_of([20, 9, 30])).inputs
    model = model_of(name, "document").eval()
    seen: list[torch.Tensor] = []
    model.get_decoder().register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state[0]))
    with torch.no_grad():
        OBJECTIVE.sums(model, inputs)
        for ids, segments in (("ids_BE", "segments_BE"), ("read_BO", "segments_BO")):
            for number in (1, 2, 3):
                place = int((inputs[segments][0] == number).nonzero()[0, 0])
                changed = inputs[ids].clone()
                changed[0, place] = 150
                OBJECTIVE.sums(model, inputs | {ids: changed})
                moved = (seen[-1] - seen[0]).abs().amax(-1) > 1e-6
                documents = inputs["segments_BO"][0]
                assert moved[documents == number].all()
                assert not moved[(documents != number) & (documents != 0)].any()


def test_a_micro_batch_without_text_is_harmless() -> None:
    micro = OBJECTIVE.prepare(batch_of([], []))
    assert micro.counts == {"span": 0, "accuracy": 0}
    model = model_of("t5", "document")
    found = LossModule(model, OBJECTIVE, bf16=False)(micro.inputs)
    assert float(found["span"].detach()) == 0
    found["span"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)  # tested with the compiler on its own
    inputs = OBJECTIVE.prepare(batch_of([20, 9, 30], [64])).inputs
    module = LossModule(model_of("t5", "document"), OBJECTIVE, bf16=False)
    eager = module(inputs)
    compiled = torch.compile(module, backend="aot_eager", dynamic=False, fullgraph=True)(inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)
    compiled["span"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_objective_travels_to_loader_workers() -> None:
    travelled = pickle.loads(pickle.dumps(OBJECTIVE))
    batch = batch_of([20, 9, 30])
    torch.testing.assert_close(travelled.prepare(batch).inputs, OBJECTIVE.prepare(batch).inputs, rtol=0, atol=0)


def test_sentinels_come_from_the_tokenizer(root: Path) -> None:
    tokenizer = load_tokenizer(root / "tokenizer/t5-8k")
    found = Corruption.of(Section(kind="span"), tokenizer, 7)
    assert found.sentinels == tuple(range(3, 103))
    assert (found.pad_id, found.eos_id, found.rate, found.mean_span_tokens) == (0, 1, 0.15, 3.0)


@pytest.mark.parametrize(
    ("changes", "missing"), [({}, "sentinels"), ({"eos_id": None}, "eos"), ({"pad_id": None}, "pad")]
)
def test_a_tokenizer_that_lacks_something(root: Path, changes: dict[str, None], missing: str) -> None:
    tokenizer = load_tokenizer(root / f"tokenizer/{'t5-8k' if changes else 'unigram-8k'}")
    with pytest.raises(TokenizerError, match=missing) as caught:
        Corruption.of(Section(kind="span"), dataclasses.replace(tokenizer, **changes), 7)
    assert "tokenizer/t5-8k" in str(caught.value.remedy)
