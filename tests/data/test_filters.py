import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.filters import Dropped, SeenTexts, is_held_out, mix
from lmssl.data.ledger import Ledger
from lmssl.data.stream import SequenceStream
from lmssl.data.window import OpenWindows, Window
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import FiltersSection, JsonlCorpus
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]
ALONE: dict[str, Any] = {"packing": "none", "sequence_length": 2048, "eos": False}
"""One whole document per sequence."""


@given(st.integers(0, 2**40), st.floats(0.01, 0.99))
def test_the_split_has_the_ratio_and_ignores_nothing(seed: int, ratio: float) -> None:
    hashes = np.arange(20_000, dtype=np.uint64)
    held_out = is_held_out(hashes, seed, ratio)
    assert held_out.mean() == pytest.approx(ratio, abs=0.03)
    assert not is_held_out(hashes, seed, 0.0).any()


def test_splits_are_pinned_and_depend_on_the_seed() -> None:
    hashes = np.arange(12, dtype=np.uint64)
    assert np.flatnonzero(is_held_out(hashes, 1, 0.3)).tolist() == [6, 8, 9, 11]
    assert not np.array_equal(is_held_out(hashes, 1, 0.5), is_held_out(hashes, 2, 0.5))
    assert np.array_equal(is_held_out(hashes, 2**64 + 1, 0.3), is_held_out(hashes, 1, 0.3))


def test_mixing_is_splitmix() -> None:
    # The generator's first output from state 0, by its reference implementation.
    assert mix(np.zeros(1, np.uint64)).tolist() == [0xE220A8397B1DCDAF]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12))
def test_seen_texts_are_a_set(windows: list[list[int]]) -> None:
    seen, expected = SeenTexts(), set()
    for hashes in windows:
        repeats = []
        for value in hashes:
            repeats.append(value in expected)
            expected.add(value)
        assert seen.add(np.array(hashes, np.uint64)).tolist() == repeats
    assert sum(map(len, seen._runs)) == len(expected)
    assert len(seen._runs) <= 6


def epoch_windows(stream: SequenceStream, corpus: str, epoch: int) -> list[Window]:
    """The windows of an epoch, through the plans that loader workers receive."""
    epochs, found, number = stream._epochs[corpus], [], 0
    while epochs.ensure(number).epoch <= epoch:
        if epochs.entry(number).epoch == epoch:
            found.append(OpenWindows(stream.layout, 1).get(epochs.plan(number)))
        number += 1
    return found


def documents(windows: list[Window]) -> Counter[tuple[int, ...]]:
    """Ids of the documents of windows that hold one document per sequence."""
    rows = [window.gather(index) for window in windows for index in range(window.num_sequences)]
    return Counter(tuple(row.ids_T[row.segments_T > 0].tolist()) for row in rows)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokenizer.backend.encode(text, add_special_tokens=False).ids) for text in texts)


def dropped(entries: list[Any]) -> Dropped:
    return sum(
        (Dropped(*(getattr(entry, name) for name in Dropped.__dataclass_fields__)) for entry in entries), Dropped()
    )


@pytest.mark.parametrize("limits", [{"min_tokens": 30}, {"max_tokens": 60}, {"min_tokens": 30, "max_tokens": 60}])
def test_length_limits(open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer, limits: dict[str, int]) -> None:
    stream = open_stream(jsonl(), validation=None, filters=limits, **ALONE)
    low, high = limits.get("min_tokens", 0), limits.get("max_tokens", 10**9)
    whole = encoded(tokenizer, texts(400))
    windows = epoch_windows(stream, "tales", 0)
    assert documents(windows) == Counter({ids: n for ids, n in whole.items() if low <= len(ids) <= high})
    short = sum(n for ids, n in whole.items() if len(ids) < low)
    long = sum(n for ids, n in whole.items() if len(ids) > high)
    entries = [entry for entry in stream.ledger.entries("tales") if entry.epoch == 0]
    assert dropped(entries) == Dropped(num_dropped_short=short, num_dropped_long=long) and short + long > 20
    assert sum(entry.num_documents + entry.num_dropped for entry in entries) == 400
    totals = stream.totals(stream.num_sequences_per_epoch()["tales"])
    assert (totals.num_dropped_short, totals.num_dropped_long) == (short, long)


def test_a_limit_counts_no_special_tokens_and_the_limit_itself_stays(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer
) -> None:
    lengths = sorted(len(ids) for ids in encoded(tokenizer, texts(20)))
    limits = {"min_tokens": lengths[3], "max_tokens": lengths[15]}
    stream = open_stream(jsonl(count=20), validation=None, filters=limits, bos=True)
    stream.sequence(0)
    kept = sum(lengths[3] <= length <= lengths[15] for length in lengths)
    per_epoch = [entry for entry in stream.ledger.entries("tales") if entry.epoch == 0]
    assert per_epoch[-1].ends_epoch and sum(entry.num_documents for entry in per_epoch) == kept


def test_held_out_documents_are_not_filtered(open_stream: Open, jsonl: Any) -> None:
    corpus, split = jsonl(), {"ratio": 0.3, "tokens": 10**6}
    filtered = open_stream(corpus, validation=split, filters={"min_tokens": 40, "drop_duplicates": True})
    (found,), (plain,) = filtered.validation(), open_stream(corpus, validation=split).validation()
    assert found.num_tokens == plain.num_tokens
    filtered.num_sequences_per_epoch()
    totals = filtered.totals()
    assert totals.num_documents + totals.num_dropped_short + found.window.num_documents == 400


@pytest.fixture
def repeated(tmp_path: Path, texts: Any) -> JsonlCorpus:
    """Two files: 300 texts, 100 of them twice in the first, 150 again in the second, some with space around."""
    distinct = texts(300)
    (tmp_path / "repeated").mkdir()
    for name, content in (("a", distinct[:200] + distinct[:100]), ("b", distinct[150:] + distinct[:25])):
        lines = [json.dumps({"text": text}) + "\n" for text in content]
        (tmp_path / "repeated" / f"{name}.jsonl").write_text("".join(lines))
    return JsonlCorpus(name="twice", kind="jsonl", path=str(tmp_path / "repeated"))


@pytest.mark.parametrize("window_chunks", [1, 3, 100])
def test_each_text_is_shown_once_per_epoch(
    open_stream: Open, repeated: JsonlCorpus, texts: Any, tokenizer: Tokenizer, window_chunks: int
) -> None:
    stream = open_stream(
        repeated, validation=None, window_chunks=window_chunks, filters={"drop_duplicates": True}, **ALONE
    )
    expected = encoded(tokenizer, texts(300))
    for epoch in (0, 1, 2):
        windows = epoch_windows(stream, "twice", epoch)
        assert documents(windows) == expected
        entries = [entry for entry in stream.ledger.entries("twice") if entry.epoch == epoch]
        assert dropped(entries) == Dropped(num_dropped_duplicates=475 - 300)
        assert [window.dropped.num_dropped_duplicates for window in windows] == [
            entry.num_dropped_duplicates for entry in entries
        ]


def test_the_first_in_the_order_of_the_epoch_stays(open_stream: Open, repeated: JsonlCorpus) -> None:
    stream = open_stream(repeated, validation=None, window_chunks=2, filters={"drop_duplicates": True})
    for epoch in (0, 1):
        seen: set[int] = set()
        for window in epoch_windows(stream, "twice", epoch):
            kept = set(zip(window._chunk_of.tolist(), window._rows.tolist(), strict=True))
            for number, chunk in enumerate(window._chunks):
                for row, text in enumerate(chunk.documents()["text_hash"].tolist()):
                    assert ((number, row) in kept) == (text not in seen)
                    seen.add(text)


def same(stream: SequenceStream, other: SequenceStream, positions: Any) -> bool:
    return all(
        np.array_equal(stream.sequence(p).ids_T, other.sequence(p).ids_T)
        and np.array_equal(stream.sequence(p).segments_T, other.sequence(p).segments_T)
        for p in positions
    )


@pytest.mark.parametrize("cache", ["cache", "other"])
def test_duplicates_are_found_again_from_the_ledger(
    open_stream: Open, repeated: JsonlCorpus, tmp_path: Path, cache: str
) -> None:
    settings: dict[str, Any] = {"window_chunks": 1, "filters": {"drop_duplicates": True}}
    stream = open_stream(repeated, **settings)
    count = stream.num_sequences_per_epoch()["twice"]
    end = 2 * count + count // 2
    whole = [stream.sequence(position) for position in range(end)]
    assert len(stream.ledger.entries("twice")) > 20
    for middle in (count // 2, count + count // 3):
        stream.ledger_at(middle).save(tmp_path / "ledger.jsonl")
        again = open_stream(repeated, cache=cache, ledger=Ledger.load(tmp_path / "ledger.jsonl"), **settings)
        for position in (middle, end - 1, 3, count - 1, count, middle - 1, 0):
            assert np.array_equal(again.sequence(position).ids_T, whole[position].ids_T)
        assert again.ledger_at(end).fingerprint == stream.ledger_at(end).fingerprint


def test_duplicates_that_were_deleted_are_found_again(open_stream: Open, repeated: JsonlCorpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"window_chunks": 1, "filters": {"drop_duplicates": True}}
    stream = open_stream(repeated, **settings)
    stream.build_ahead(100)
    files = sorted((tmp_path / "cache" / "duplicates").rglob("*.npy"))
    assert len(files) == len(stream.ledger.entries("twice"))
    for number, file in enumerate(files):
        if number % 2:
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[-20] ^= 1
            file.write_bytes(content)
    with pytest.raises(DataError, match="removed or damaged during the run"):
        Window(stream._epochs["twice"].plan(0), stream.layout)
    again = open_stream(repeated, ledger=stream.ledger, **settings)
    assert same(again, open_stream(repeated, cache="third", **settings), (90, 40, 0, 70))


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_filters_hold_in_the_loader(open_stream: Open, repeated: JsonlCorpus, workers: int) -> None:
    stream = open_stream(repeated, window_chunks=2, filters={"drop_duplicates": True, "min_tokens": 20})
    batches = training_batches(
        stream,
        plan=BatchPlan.even(40),
        micro_batch_sequences=8,
        world_size=1,
        rank=0,
        start_step=1,
        num_steps=2,
        prepare=as_is,
        workers=workers,
    )
    for step in batches:
        for batch in step:
            for ids, position in zip(batch.ids_BT, batch.positions_B.tolist(), strict=True):
                assert np.array_equal(ids, stream.sequence(position).ids_T)


def test_equal_texts_of_two_corpora_both_stay(open_stream: Open, jsonl: Any) -> None:
    one, two = jsonl("a", count=50), jsonl("b", count=50)
    stream = open_stream(one, two, validation=None, filters={"drop_duplicates": True})
    stream.num_sequences_per_epoch()
    assert stream.totals().num_dropped_duplicates == 0


def test_nothing_left(open_stream: Open, jsonl: Any) -> None:
    with pytest.raises(DataError, match=r"data.filters drops every document of the corpus") as caught:
        open_stream(jsonl(count=20), filters={"min_tokens": 10**6}).sequence(0)
    assert "relax data.filters" in str(caught.value)


def test_limits_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="min_tokens: 9 is more than max_tokens=8"):
        FiltersSection(min_tokens=9, max_tokens=8)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"filters": {"min_tokens": 3}}, "data.filters.min_tokens"),
        ({"filters": {"max_tokens": 300}}, "data.filters.max_tokens"),
        ({"filters": {"drop_duplicates": True}}, "data.filters.drop_duplicates"),
        ({"align_starts": True}, "data.align_starts"),
    ],
)
def test_a_changed_filter_under_a_ledger(open_stream: Open, jsonl: Any, change: dict[str, Any], name: str) -> None:
    corpus = jsonl()
    for then, now in (({}, change), (change, {})):
        ledger = open_stream(corpus, **then).ledger
        with pytest.raises(DataError, match=f"{name} decides the order of the data, and changed"):
            open_stream(corpus, ledger=ledger, **now)
