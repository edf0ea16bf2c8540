"""Windows whose segments each stand between cls and sep."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.batch import SequenceBatch
from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units
from lmssl.data.layout import Layout
from lmssl.data.statistics import measure
from lmssl.data.stream import SequenceStream
from lmssl.data.window import Window, WindowPlan
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]
LAYOUT = Layout(32, "best_fit", None, None, pad_id=2, seed=1, held_out_ratio=0.0, cls_id=0, sep_id=1)
CASES = [
    pytest.param(replace(LAYOUT, packing=packing, **change), id=f"{packing}-{name}")
    for packing in ("best_fit", "concat", "none")
    for name, change in {
        "cls and sep": {},
        "cls": {"sep_id": None},
        "sep": {"cls_id": None},
        "two seps": {"seps_per_segment": 2},
        "starts first": {"align_starts": True},
    }.items()
]


@pytest.fixture
def plan(jsonl: Any, tokenizer: Tokenizer, tmp_path: Path) -> WindowPlan:
    cache = ChunkCache(tmp_path / "cache", tokenizer, max_bad_records=0, report=print, cancelled=lambda: False)
    units = list_units(jsonl(count=60), chunk_bytes=2048)
    return WindowPlan("tales", 0, 0, tuple(cache.get(unit, 0).path for unit in units))


@pytest.fixture
def documents(texts: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the window's documents; none is a special token."""
    return [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts(60)]


@pytest.mark.parametrize("layout", CASES)
def test_each_segment_is_own_tokens_between_special_ones(
    plan: WindowPlan, documents: list[list[int]], texts: Any, layout: Layout
) -> None:
    window = Window(plan, layout)
    first, last = int(layout.cls_id is not None), layout.overhead_tokens - int(layout.cls_id is not None)
    held: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    num_tokens = num_padding = num_segments = 0
    shares: dict[int, float] = defaultdict(float)
    for index in range(window.num_sequences):
        row = window.gather(index)
        pieces = window.pieces(index)
        num_tokens += int((row.segments_T > 0).sum())
        num_padding += int((row.segments_T == 0).sum())
        num_segments += len(pieces)
        assert (row.ids_T[row.segments_T == 0] == layout.pad_id).all()
        assert len(pieces) == row.segments_T.max()
        for number, piece in enumerate(pieces, start=1):
            places = np.flatnonzero(row.segments_T == number)
            assert places.tolist() == list(range(piece.start, piece.start + piece.length))
            assert row.offsets_T[places].tolist() == list(range(piece.length))
            ids = row.ids_T[places].tolist()
            own = ids[first : len(ids) - last]
            assert ids[:first] == [layout.cls_id] * first and ids[len(ids) - last :] == [layout.sep_id] * last
            assert own and not {0, 1, 2} & set(own) and piece.stop - piece.first == len(own)
            held[piece.chunk, piece.row].append((piece.first, own))
            assert index in window.holders(piece.chunk, piece.row)
        shares[index] = row.num_bytes
    found = [[token for _, own in sorted(parts) for token in own] for parts in held.values()]
    assert sorted(found) == sorted(documents)
    assert max(map(len, held.values())) > 2  # a middle segment, whose ends are cuts
    assert num_tokens == window.num_tokens == sum(map(len, documents)) + num_segments * layout.overhead_tokens
    assert window.num_document_tokens == sum(map(len, documents))
    assert num_padding == window.packing.num_padding == window.num_sequences * 32 - num_tokens
    assert window.packing.padding_ratio == num_padding / (32 * window.num_sequences)
    assert sum(shares.values()) == pytest.approx(window.num_bytes) == sum(len(text.encode()) for text in texts(60))


def test_bytes_go_with_own_tokens(plan: WindowPlan) -> None:
    layout = replace(LAYOUT, packing="none")
    window = Window(plan, layout)
    totals: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    for index in range(window.num_sequences):
        (piece,) = window.pieces(index)
        totals[piece.chunk, piece.row].append((piece.stop - piece.first, window.gather(index).num_bytes))
    for (chunk, row), parts in totals.items():
        num_bytes = int(window.chunks[chunk].documents()["num_bytes"][row])
        num_tokens = sum(count for count, _ in parts)
        assert all(found == pytest.approx(num_bytes * count / num_tokens) for count, found in parts)


def test_one_document_a_row_where_nothing_is_packed(plan: WindowPlan, documents: list[list[int]]) -> None:
    window = Window(plan, replace(LAYOUT, packing="none"))
    assert window.num_sequences == sum(math.ceil(len(document) / 30) for document in documents)
    assert window.packing.num_cut_documents == sum(len(document) > 30 for document in documents)


def test_without_them_a_window_is_what_it_was(plan: WindowPlan) -> None:
    plain = replace(LAYOUT, cls_id=None, sep_id=None)
    one, other = Window(plan, plain), Window(plan, replace(plain, seps_per_segment=2))
    assert one.num_tokens == one.num_document_tokens == other.num_tokens
    for index in range(one.num_sequences):
        assert np.array_equal(one.gather(index).ids_T, other.gather(index).ids_T)


def test_rows_of_a_batch_read_the_same(plan: WindowPlan) -> None:
    window = Window(plan, LAYOUT)
    batch = SequenceBatch.of([(5, window, 5), None, (0, window, 0)], LAYOUT)
    for row, index in ((0, 5), (2, 0)):
        assert np.array_equal(batch.ids_BT[row], window.gather(index).ids_T)
        assert np.array_equal(batch.segments_BT[row], window.gather(index).segments_T)
        starts = batch.offsets_BT[row] == 0
        assert (batch.ids_BT[row][starts & (batch.segments_BT[row] > 0)] == LAYOUT.cls_id).all()
    assert (batch.ids_BT[1] == LAYOUT.pad_id).all() and not batch.segments_BT[1].any()


@pytest.mark.parametrize("seps", [1, 2])
def test_held_out_text_is_measured_without_them(
    open_stream: Open, jsonl: Any, tokenizer: Tokenizer, texts: Any, seps: int
) -> None:
    around = {"eos": False, "cls": True, "sep": True, "seps_per_segment": seps}
    corpus, held_out = jsonl(count=900), {"ratio": 0.3, "tokens": 1500}
    (plain,) = open_stream(corpus, eos=False, validation=held_out).validation()
    (split,) = open_stream(corpus, **around, validation=held_out).validation()
    assert plain.num_tokens == split.window.num_document_tokens == 1500
    assert split.num_bytes == plain.num_bytes
    assert split.num_tokens == 1500 + (1 + seps) * len(split.window.packing.documents)
    rows = [split.sequence(index) for index in range(split.num_sequences)]
    assert sum(row.num_bytes for row in rows) == pytest.approx(plain.num_bytes, abs=1)
    known = set(texts(900))
    for row in rows:
        for number in range(1, row.segments_T.max() + 1):
            ids = row.ids_T[row.segments_T == number].tolist()
            assert ids[0] == tokenizer.cls_id and ids[-seps:] == [tokenizer.sep_id] * seps
            assert any(tokenizer.decode(ids[1:-seps]) in text for text in known)


def test_statistics_count_them_per_segment(open_stream: Open, jsonl: Any, tokenizer: Tokenizer, texts: Any) -> None:
    stream = open_stream(jsonl(), eos=False, cls=True, sep=True, validation=None)
    found = measure(stream, "tales", lambda _: None)
    lengths = [len(tokenizer.backend.encode(text, add_special_tokens=False).ids) for text in texts(400)]
    num_segments = sum(len(window.packing.documents) for _, window in stream.first_epoch("tales"))
    assert found.num_tokens == sum(lengths) + 2 * num_segments
    assert found.num_padding_tokens == 64 * found.num_sequences - found.num_tokens
    assert found.padding_ratio == found.num_padding_tokens / (64 * found.num_sequences)
    assert found.num_cut_documents == sum(length > 62 for length in lengths) > 0
    totals = stream.totals()
    assert (totals.num_tokens, totals.num_padding) == (found.num_tokens, found.num_padding_tokens)


def test_a_stream_goes_on_from_its_ledger(open_stream: Open, jsonl: Any) -> None:
    around = {"eos": False, "cls": True, "sep": True}
    stream = open_stream(jsonl(), **around)
    expected = [stream.sequence(position) for position in range(90)]
    ledger = stream.ledger_at(40)
    again = open_stream(jsonl(), **around, ledger=ledger)
    for position in (0, 39, 40, 89):
        row = again.sequence(position)
        assert np.array_equal(row.ids_T, expected[position].ids_T)
        assert np.array_equal(row.segments_T, expected[position].segments_T)
