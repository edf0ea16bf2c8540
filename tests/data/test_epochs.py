from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units
from lmssl.data.epochs import Epochs
from lmssl.data.ledger import Ledger, LedgerEntry
from lmssl.data.window import Layout
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
