"""The same positions have the same masks, whoever reads them: ranks, micro-batches, loader processes, later starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.stream import SequenceStream
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.hybrid import HybridObjective
from lmssl.objective.masked import MaskedObjective
from lmssl.objective.masking import Masking
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.objective import MaskedObjective as Section
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes

BATCH, STEPS = 24, 3
Rows = dict[int, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


@pytest.fixture
def stream(open_stream: Any, jsonl: Any) -> SequenceStream:
    """Epochs of a few windows each, so that what is read crosses both."""
    special = {"bos": False, "eos": False, "cls": True, "sep": True}
    opened: SequenceStream = open_stream(jsonl(count=60), chunk_bytes=1024, window_chunks=3, validation=None, **special)
    return opened


def masking(tokenizer: Tokenizer, strategy: str) -> Masking:
    section = Section(kind="masked", strategy=strategy, rate=0.4, final_rate=0.1)
    return Masking.of(section, tokenizer, 7, BATCH * STEPS)


class Kept:
    """Prepares as an objective does, and keeps which positions the rows are; picklable, for loader processes."""

    def __init__(self, objective: MaskedObjective | HybridObjective) -> None:
        self.objective = objective

    def __call__(self, batch: SequenceBatch) -> tuple[list[int], MicroBatch]:
        return batch.positions_B.tolist(), self.objective.prepare(batch)


def read(
    stream: SequenceStream, kept: Kept, world_size: int, micro: int, *, workers: int = 0, start: int = 0
) -> tuple[Rows, dict[str, int], float]:
    """Every row's inputs by position, and the sums of counts and bytes, of all ranks together."""
    rows: Rows = {}
    counts: dict[str, int] = {}
    num_bytes = 0.0
    for rank in range(world_size):
        steps = training_batches(
            stream,
            plan=BatchPlan.even(BATCH),
            micro_batch_sequences=micro,
            world_size=world_size,
            rank=rank,
            start_step=start,
            num_steps=STEPS - start,
            prepare=kept,
            workers=workers,
        )
        for positions, found in (part for step in steps for part in step):
            for row, position in enumerate(positions):
                inputs = {name: tensor[row].tolist() for name, tensor in found.inputs.items()}
                if position < 0:
                    targets = (
                        value for name, value in inputs.items() if name in ("targets_BC", "masked_BC", "causal_BT")
                    )
                    assert all(set(values) == {IGNORE} for values in targets)
                    continue
                assert position not in rows
                rows[position] = inputs
            counts = {name: counts.get(name, 0) + value for name, value in found.counts.items()}
            num_bytes += found.num_bytes
    return rows, counts, num_bytes


@pytest.mark.parametrize("strategy", ["token", "whole_word", "span"])
def test_every_layout_masks_the_same_tokens(stream: SequenceStream, tokenizer: Tokenizer, strategy: str) -> None:
    kept = Kept(MaskedObjective(masking(tokenizer, strategy), surface_bytes(tokenizer)))
    rows, counts, num_bytes = read(stream, kept, 1, BATCH)
    assert rows.keys() == set(range(BATCH * STEPS))
    assert counts["masked"] > 0 and num_bytes > 0
    for world_size, micro in ((1, 5), (2, 3), (3, 8), (4, 5), (8, 1), (512, 1)):
        again, same_counts, same_bytes = read(stream, kept, world_size, micro)
        assert again == rows
        assert same_counts == counts
        assert same_bytes == pytest.approx(num_bytes, rel=1e-12)


def test_both_kinds_of_hybrid_rows_stay_at_their_positions(stream: SequenceStream, tokenizer: Tokenizer) -> None:
    kept = Kept(HybridObjective(masking(tokenizer, "token"), 7, 0.25))
    rows, counts, _ = read(stream, kept, 1, BATCH)
    assert sum(bool(row["masked_B"]) for row in rows.values()) == BATCH * STEPS // 4
    for world_size, micro in ((2, 3), (3, 8), (8, 1), (512, 1)):
        again, same_counts, _ = read(stream, kept, world_size, micro)
        assert again == rows
        assert same_counts == counts


@pytest.mark.parametrize("kind", ["masked", "hybrid"])
def test_loader_processes_and_later_starts_mask_the_same(
    stream: SequenceStream, tokenizer: Tokenizer, kind: str
) -> None:
    words = masking(tokenizer, "whole_word")
    masked = MaskedObjective(words, surface_bytes(tokenizer))
    kept = Kept(masked if kind == "masked" else HybridObjective(words, 7, 0.5))
    rows, _, _ = read(stream, kept, 1, 7)
    assert read(stream, kept, 1, 4, workers=1)[0] == rows
    later = read(stream, kept, 2, 5, start=1)[0]
    assert later == {position: row for position, row in rows.items() if position >= BATCH}


def test_full_windows_leave_hardly_any_padding(open_stream: Any, jsonl: Any, tokenizer: Tokenizer) -> None:
    """Rows have a constant number of tokens and batches need no unpadding, with [CLS] and [SEP] around short texts."""
    special = {"bos": False, "eos": False, "cls": True, "sep": True}
    sizes = {"sequence_length": 512, "chunk_bytes": 2**19, "window_chunks": 2, "validation": None}
    stream: SequenceStream = open_stream(jsonl(count=16_000), **sizes, **special)
    *full, _ = (window.num_sequences for _, window in stream.first_epoch("tales"))
    objective, num_rows = MaskedObjective(masking(tokenizer, "token"), surface_bytes(tokenizer)), sum(full)
    assert num_rows > 600
    (step,) = training_batches(
        stream,
        plan=BatchPlan.even(num_rows),
        micro_batch_sequences=16,
        world_size=1,
        rank=0,
        start_step=0,
        num_steps=1,
        prepare=objective.prepare,
        workers=0,
    )
    assert {tuple(micro.inputs["ids_BT"].shape) for micro in step} == {(16, 512)}
    assert 0 < sum(micro.num_padding_tokens for micro in step) < 0.004 * num_rows * 512
    assert sum(int(micro.inputs["segments_BT"].amax(1).sum()) for micro in step) > 8 * num_rows  # documents
