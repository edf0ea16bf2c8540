"""Stages with sequences of another length: nothing is lost or read twice, whoever reads, whatever was interrupted."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.ledger import Ledger
from lmssl.data.pack import PACKINGS
from lmssl.data.repack import Runs
from lmssl.data.search import search
from lmssl.data.statistics import measure
from lmssl.data.stream import SequenceStream
from lmssl.data.trace import Tracer
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan, Ramp, kept_before, plan_batches
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]
SMALL = {"chunk_bytes": 1024, "window_chunks": 3, "sequence_length": 64}
# Positions 24, 32, 36 and 76 (in tokens 1536, 2560, 3072, 5632): the third begins inside what the second repacks.
STAGES = [
    {"from_tokens": 1536, "sequence_length": 128},
    {"from_tokens": 2560, "sequence_length": 256, "weights": {"a": 0.5, "b": 0.5}},
    {"from_tokens": 3584, "sequence_length": 32},
]
STARTS = [(0, 64), (24, 128), (32, 256), (36, 32)]
EVERYTHING: dict[str, Any] = {
    "bos": True,
    "cls": True,
    "sep": True,
    "align_starts": True,
    "filters": {"min_tokens": 5, "drop_duplicates": True},
    "skip": [(3, 9), (20, 27), (60, 61)],
}
RECIPES = pytest.mark.parametrize(
    "recipe",
    [{"packing": "best_fit"}, {"packing": "concat"}, {"packing": "none"}, {"chunk_bytes": 1 << 20}, EVERYTHING],
    ids=["best_fit", "concat", "none", "one_window", "everything"],
)


@pytest.fixture
def build(open_stream: Open, jsonl: Any) -> Open:
    """`build(**settings)`: a stream over two corpora with the stages above."""
    corpora = jsonl("a", count=70, weight=0.7), jsonl("b", count=40, seed=1, weight=0.3)

    def run(**settings: Any) -> SequenceStream:
        return open_stream(*corpora, **(SMALL | {"stages": STAGES, "validation": None} | settings))

    return run


def spans(stream: SequenceStream, num_epochs: int) -> dict[Any, list[tuple[int, int]]]:
    """Which tokens of each document the first epochs of all corpora hold, segment by segment."""
    held: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    epochs = {corpus.name: 0 for corpus in stream.section.mixture}
    position = 0
    while min(epochs.values()) < num_epochs:
        window, index = stream.window_at(position)
        plan = window.plan
        epochs[plan.corpus] = plan.epoch
        for piece in window.pieces(index) if plan.epoch < num_epochs else ():
            document = plan.corpus, plan.epoch, window.chunks[piece.chunk].path, piece.row
            held[document].append((piece.first, piece.stop))
        position += 1
    return {document: sorted(found) for document, found in held.items()}


@RECIPES
def test_every_position_has_the_length_of_its_stage(build: Open, recipe: Any) -> None:
    stream = build(**recipe)
    for position in range(150):
        length = [length for first, length in STARTS if first <= position][-1]
        row = stream.sequence(position)
        assert row.ids_T.shape == row.segments_T.shape == (length,)
        assert stream.layout_at(position).sequence_length == length
    assert stream.sequences([33, 35]).ids_BT.shape == (2, 256)


@RECIPES
def test_no_token_is_lost_or_read_twice(build: Open, recipe: Any) -> None:
    found, plain = spans(build(**recipe), 2), spans(build(**recipe | {"stages": []}), 2)
    assert found.keys() == plain.keys()
    for document, parts in found.items():
        assert parts[0][0] == 0 and parts[-1][1] == plain[document][-1][1]
        assert all(stop == first for (_, stop), (first, _) in pairwise(parts))


def test_what_is_left_of_a_window_is_packed_before_the_next(build: Open) -> None:
    stream = build()
    stream.sequence(60)
    entries = stream.ledger.entries("a")
    cut = [number for number in range(len(entries) - 1) if stream.ledger.is_cut("a", number)]
    assert len(cut) == 3  # once per change; the third cuts what the second repacked
    for number in cut:
        before, entry = entries[number], entries[number + 1]
        left = before.num_sequences - len(stream.ledger.read("a", number))
        assert 0 < left < before.num_sequences
        assert entry.checksum == before.checksum and entry.sequence_length != before.sequence_length
        assert (entry.epoch, entry.window, entry.next_unit) == (before.epoch, before.window + 1, before.next_unit)
        assert entry.num_tokens < before.num_tokens and entry.num_bytes < before.num_bytes
    assert len(stream.plan("a", cut[-1] + 1).repacked) >= 1
    assert max(len(stream.plan("a", number).repacked) for number in range(len(entries))) == 2


def test_the_last_window_of_an_epoch_may_be_cut(build: Open) -> None:
    stream = build(chunk_bytes=1 << 20)
    stream.ledger_at(32)  # both corpora, into the second stage
    first, second = stream.ledger.entries("a")[:2]
    assert first.ends_epoch and second.ends_epoch and stream.ledger.is_cut("a", 0)
    assert (second.epoch, second.window) == (0, 1)


def test_neighbours_left_over_are_one_run_again() -> None:
    """A document of 300 tokens in pieces of 62 with an overhead of 2: all but the second piece is left."""
    packing = PACKINGS["concat"](np.array([300, 20]), 64, 2)
    order = np.arange(packing.num_sequences)
    left = Runs.unread(packing, np.delete(order, 1), 2)
    assert left.documents.tolist() == [0, 0, 1]
    assert left.starts.tolist() == [0, 124, 0]
    assert left.lengths.tolist() == [62, 176, 20]
    longer = left.pack(PACKINGS["best_fit"], 2, 256, 2)
    assert longer.num_sequences == 2 and longer.num_documents == 2
    held = sorted(zip(longer.documents.tolist(), longer.starts.tolist(), longer.lengths.tolist(), strict=True))
    assert held == [(0, 0, 64), (0, 124, 178), (1, 0, 22)]
    nothing = Runs.unread(packing, order[:0], 2)
    assert nothing.pack(PACKINGS["best_fit"], 2, 256, 2).num_sequences == 0


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


def plan_of(stream: SequenceStream) -> BatchPlan:
    """Steps of 256 to 768 tokens."""
    skip = stream.section.skip
    kept = tuple((kept_before(first, skip), length) for first, length in stream.section.starts)
    return plan_batches(7000, Ramp(256, 768, 2000), kept)


@RECIPES
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_resumptions_read_the_same(build: Open, tmp_path: Path, recipe: Any, world_size: int) -> None:
    whole = build(**recipe)
    plan = plan_of(whole)
    kept = [p for p in range(400) if not any(start <= p < end for start, end in whole.section.skip)]
    found: dict[int, bytes] = {}
    ledger = None
    legs = [(0, 3), (3, 6), (6, 7), (7, 8), (8, 12), (12, plan.num_steps)]
    for begin, end in legs:
        streams = [build(**recipe, ledger=ledger, cache=f"cold-{begin % 2}") for _ in range(world_size)]
        for rank, stream in enumerate(streams):
            settings = {"plan": plan, "micro_batch_sequences": 4, "world_size": world_size, "rank": rank}
            settings |= {"start_step": begin, "num_steps": end - begin, "workers": 0}
            for step, batches in enumerate(training_batches(stream, prepare=as_is, **settings), begin):
                length, first = plan.sequence_length(step), plan.first_position(step)
                for batch in batches:
                    assert batch.ids_BT.shape == batch.segments_BT.shape == (max(1, 256 // length), length)
                    for row, position in enumerate(batch.positions_B.tolist()):
                        if position >= 0:
                            assert position in kept[first : first + plan.num_sequences(step)]
                            assert position not in found
                            found[position] = batch.ids_BT[row].tobytes() + batch.segments_BT[row].tobytes()
        cursor = kept[plan.first_position(end)]
        assert streams[-1].ledger_at(cursor).text() == whole.ledger_at(cursor).text()
        streams[-1].ledger_at(cursor).save(tmp_path / "ledger")
        ledger = Ledger.load(tmp_path / "ledger")
    assert sorted(found) == kept[: plan.num_positions]
    for position, content in found.items():
        row = whole.sequence(position)
        assert content == row.ids_T.tobytes() + row.segments_T.tobytes()


def test_resumed_at_every_position(build: Open) -> None:
    whole = build()
    for position in range(1, 90):
        stream = build(ledger=whole.ledger_at(position))
        assert stream.sequence(position).ids_T.tobytes() == whole.sequence(position).ids_T.tobytes()
        assert stream.epochs_at(position) == whole.epochs_at(position)
        assert stream.ledger_at(position).text() == whole.ledger_at(position).text()


def test_epochs_grow_with_every_position(build: Open) -> None:
    stream = build()
    passed = [sum(stream.epochs_at(position).values()) for position in range(150)]
    assert all(a < b for a, b in pairwise(passed))


def test_a_length_ahead_may_be_added_and_one_behind_may_not_change(build: Open, tmp_path: Path) -> None:
    plain, whole = build(stages=[]), build()
    ledger = plain.ledger_at(24)
    assert "sequence_length" not in "".join(ledger.text().splitlines()[1:])  # as without the feature
    continued = build(ledger=ledger, read_positions=24)
    assert continued.ledger_at(70).text() == whole.ledger_at(70).text()
    assert json.loads(whole.ledger_at(70).text().splitlines()[0])["stages"][1]["sequence_length"] == 128
    for changed in ([], [{**STAGES[0], "sequence_length": 256}, *STAGES[1:]], [{**STAGES[0], "rope_theta": 5e4}]):
        with pytest.raises(DataError, match=r"data\.stages changed for a part of the run"):
            build(stages=changed, ledger=whole.ledger_at(70), read_positions=70)


def test_search_trace_and_statistics_know_of_it(build: Open, tokenizer: Tokenizer) -> None:
    stream = build()
    tracer = Tracer(stream, tokenizer)
    for traced in tracer.sequences(range(20, 45)):
        assert len(traced.ids) == sum(segment.length for segment in traced.segments) + traced.num_padding_tokens
    matches, _ = search(stream, "0-", finder=tracer.finder, limit=500, report=print)
    by_document: dict[tuple[str, int], set[int]] = defaultdict(set)
    for position in range(150):
        for traced in tracer.sequences([position]):
            for segment in traced.segments:
                if traced.epoch == 0 and segment.corpus == "a":
                    by_document[segment.file, segment.record].add(position)
    assert len(matches) >= 60
    for match in matches:
        if match.corpus == "a" and match.positions and match.positions[-1] < 150:
            assert set(match.positions) == by_document[match.document.file, match.document.record]
    plain = build(stages=[])
    for corpus in "ab":
        ours, theirs = (measure(s, corpus, lambda _: None) for s in (stream, plain))
        assert (ours.num_documents, ours.num_bytes) == (theirs.num_documents, theirs.num_bytes)
    assert stream.num_sequences_per_epoch().keys() == {"a", "b"}
