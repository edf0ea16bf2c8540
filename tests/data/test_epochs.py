import gzip
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units
from lmssl.data.epochs import Epochs
from lmssl.data.layout import Layout
from lmssl.data.ledger import Ledger, LedgerEntry
from lmssl.tokenizer.load import Tokenizer

LAYOUT = Layout(64, "best_fit", bos_id=None, eos_id=1, pad_id=2, seed=1, held_out_ratio=0.1)


@pytest.fixture
def open_epochs(jsonl: Any, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Epochs]:
    units = list_units(jsonl(count=400), chunk_bytes=4096)
    cache = ChunkCache(tmp_path / "cache", tokenizer, max_bad_records=0, report=print, cancelled=lambda: False)

    def build(ledger: Ledger | None = None, window_chunks: int = 4) -> Epochs:
        ledger = ledger or Ledger([], {})
        return Epochs(units, cache, LAYOUT, ledger, window_chunks=window_chunks, max_bad_records=0)

    return build


def entries(epochs: Epochs, count: int) -> list[LedgerEntry]:
    return [epochs.ensure(number) for number in range(count)]


def test_windows_grow_once_and_never_span_an_epoch(open_epochs: Callable[..., Epochs]) -> None:
    epochs = open_epochs()
    found = entries(epochs, 12)
    first = [entry for entry in found if entry.epoch == 0]
    second = [entry for entry in found if entry.epoch == 1]
    assert [entry.num_chunks for entry in first[:4]] == [1, 2, 4, 4]
    assert [entry.num_chunks for entry in second[:2]] == [4, 4]
    assert sum(entry.num_chunks for entry in first) == len(epochs.units)
    assert [entry.ends_epoch for entry in first] == [False] * (len(first) - 1) + [True]
    assert [entry.window for entry in first] == list(range(len(first)))
    assert second[0].window == 0


def test_a_ledger_is_continued_where_it_ends(open_epochs: Callable[..., Epochs]) -> None:
    whole = entries(open_epochs(), 12)
    ledger = Ledger([], {})
    for entry in whole[:3]:
        ledger.append(entry)
    assert entries(open_epochs(ledger), 12) == whole


def test_plans_are_found_again_after_they_were_forgotten(open_epochs: Callable[..., Epochs]) -> None:
    epochs = open_epochs(window_chunks=1)
    entries(epochs, 20)
    fresh = open_epochs(window_chunks=1)
    entries(fresh, 2)
    assert epochs.plan(1) == fresh.plan(1)


def test_epochs_have_their_own_order(open_epochs: Callable[..., Epochs]) -> None:
    epochs = open_epochs(window_chunks=1)
    count = len(epochs.units)
    entries(epochs, 2 * count)
    orders = [[epochs.plan(number).chunks for number in range(first, first + count)] for first in (0, count)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_epochs_passed_are_a_function_of_the_sequences_alone(open_epochs: Callable[..., Epochs]) -> None:
    epochs, ahead = open_epochs(), open_epochs()
    entries(ahead, 20)
    found = [epochs.passed(k) for k in range(400)]
    assert found == [ahead.passed(k) for k in range(400)]
    assert found[0] == 0 and all(a < b for a, b in pairwise(found))
    sizes = [sum(entry.num_sequences for entry in entries(ahead, 20) if entry.epoch == epoch) for epoch in (0, 1)]
    assert epochs.passed(sizes[0]) == 1.0
    assert epochs.passed(sizes[0] + sizes[1]) == 2.0
    # Between whole epochs, bytes of text stand for sequences.
    assert epochs.passed(sizes[0] // 2) == pytest.approx(0.5, abs=0.05)
    assert epochs.passed(sizes[0] + sizes[1] // 4) == pytest.approx(1.25, abs=0.05)


def test_the_estimate_of_an_epoch_takes_one_chunk(open_epochs: Callable[..., Epochs]) -> None:
    epochs = open_epochs()
    estimate = epochs.estimate_sequences()
    assert len(entries(epochs, 1)) == 1
    whole = open_epochs()
    number = 0
    while not whole.ensure(number).ends_epoch:
        number += 1
    exact = sum(entry.num_sequences for entry in entries(whole, number + 1))
    assert estimate == pytest.approx(exact, rel=0.25)
    assert whole.estimate_sequences() == estimate  # it depends on the first chunk, not on what is known by now


def test_the_estimate_of_a_compressed_file(jsonl: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = jsonl(count=600)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(str(corpus.path)).read_bytes()))
    units = list_units(corpus.model_copy(update={"path": str(packed)}), chunk_bytes=4096)
    assert len(units) == 1
    cache = ChunkCache(tmp_path / "cache", tokenizer, max_bad_records=0, report=print, cancelled=lambda: False)
    epochs = Epochs(units, cache, LAYOUT, Ledger([], {}), window_chunks=4, max_bad_records=0)
    estimate, number = epochs.estimate_sequences(), 0
    while not epochs.ensure(number).ends_epoch:
        number += 1
    exact = sum(entry.num_sequences for entry in entries(epochs, number + 1))
    assert estimate == pytest.approx(exact, rel=0.25)
    assert epochs.passed(exact // 2) == pytest.approx(0.5, abs=0.1)
