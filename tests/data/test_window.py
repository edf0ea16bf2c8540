from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units
from lmssl.data.layout import Layout
from lmssl.data.window import OpenWindows, Window, WindowPlan, gather_rows
from lmssl.errors import DataError
from lmssl.tokenizer.load import Tokenizer

LAYOUT = Layout(32, "best_fit", bos_id=0, eos_id=1, pad_id=2, seed=1, held_out_ratio=0.0)


@pytest.fixture
def plan(jsonl: Any, tokenizer: Tokenizer, tmp_path: Path) -> WindowPlan:
    cache = ChunkCache(tmp_path / "cache", tokenizer, max_bad_records=0, report=print, cancelled=lambda: False)
    units = list_units(jsonl(count=60), chunk_bytes=2048)
    return WindowPlan("tales", 0, 0, tuple(cache.get(unit, 0).path for unit in units))


def test_special_tokens_stand_around_documents(plan: WindowPlan) -> None:
    window = Window(plan, replace(LAYOUT, sequence_length=512))
    assert window.num_documents == 60
    for index in range(window.num_sequences):
        row = window.gather(index)
        for number in range(1, row.segments_T.max() + 1):
            ids = row.ids_T[row.segments_T == number]
            assert (ids[0], ids[-1]) == (0, 1) and not np.isin(ids[1:-1], (0, 1)).any()


@pytest.mark.parametrize("length", [1, 2, 3, 31])
def test_tiny_sequences_cut_anywhere(plan: WindowPlan, length: int) -> None:
    window = Window(plan, replace(LAYOUT, sequence_length=length, packing="concat"))
    rows = [window.gather(index) for index in range(window.num_sequences)]
    ids = np.concatenate([row.ids_T[row.segments_T > 0] for row in rows])
    assert (np.bincount(ids, minlength=2)[:2] == 60).all()
    assert len(ids) == window.num_tokens
    assert sum(row.num_bytes for row in rows) == pytest.approx(window.num_bytes)


def test_the_order_depends_on_epoch_and_window(plan: WindowPlan) -> None:
    firsts = {
        Window(replace(plan, epoch=epoch, window=number), replace(LAYOUT, seed=seed)).gather(0).ids_T.tobytes()
        for epoch, number, seed in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))
    }
    assert len(firsts) > 1


def test_windows_are_kept_open(plan: WindowPlan) -> None:
    windows = OpenWindows(LAYOUT, 2)
    plans = [replace(plan, window=number) for number in range(3)]
    first = windows.get(plans[0])
    assert windows.get(plans[0]) is first
    windows.get(plans[1])
    assert windows.get(plans[0]) is first
    windows.get(plans[2])
    assert windows.get(plans[0]) is first
    windows.get(plans[1])
    windows.get(plans[2])
    assert windows.get(plans[0]) is not first


def test_more_windows_stay_open_while_their_tables_are_small(plan: WindowPlan) -> None:
    plans = [replace(plan, window=number) for number in range(6)]
    size = Window(plan, LAYOUT).table_bytes
    table = Window(plan, LAYOUT)._table
    assert size > table.nbytes > 0
    windows = OpenWindows(LAYOUT, 2, 4 * size + size // 2)
    opened = [windows.get(each) for each in plans]
    assert [windows.get(each) for each in plans[2:]] == opened[2:], "the four used last"
    assert windows.get(plans[0]) is not opened[0]
    assert windows.get(plans[3]) is opened[3]
    assert windows.get(plans[2]) is not opened[2], "the one that was used first made room"


def test_a_chunk_that_vanished(plan: WindowPlan) -> None:
    (plan.chunks[0] / "meta.json").unlink()
    with pytest.raises(DataError, match="removed or damaged during the run") as caught:
        Window(plan, LAYOUT)
    assert caught.value.where == str(plan.chunks[0])


def test_rows_are_gathered_together_as_one_by_one(plan: WindowPlan) -> None:
    window, other = Window(plan, LAYOUT), Window(replace(plan, epoch=1), LAYOUT)
    places = [(window, index) for index in range(window.num_sequences)]
    places = [place for pair in zip(places, [None] * len(places), strict=True) for place in pair]  # type: ignore[misc]
    rows = gather_rows([*places, (other, 3)], LAYOUT)
    assert "offsets_BT" not in vars(rows), "who asks for ids and segments pays for no offsets"
    assert rows.ids_BT.dtype == rows.offsets_BT.dtype == np.int64 and rows.segments_BT.dtype == np.int32
    num_padded = 0
    for row, place in enumerate([*places, (other, 3)]):
        if place is None:
            assert (rows.ids_BT[row] == LAYOUT.pad_id).all()
            assert not rows.segments_BT[row].any() and not rows.offsets_BT[row].any() and not rows.num_bytes_B[row]
            continue
        alone = place[0].gather(place[1])
        assert np.array_equal(rows.ids_BT[row], alone.ids_T)
        assert np.array_equal(rows.segments_BT[row], alone.segments_T)
        assert np.array_equal(rows.offsets_BT[row], alone.offsets_T)
        assert rows.num_bytes_B[row] == alone.num_bytes
        num_padded += int((alone.segments_T == 0).any())
        starts = np.flatnonzero(np.diff(alone.segments_T, prepend=0))
        for start, end in zip(starts, [*starts[1:], 32], strict=True):  # obviously right, if slow
            expected = np.arange(end - start) if alone.segments_T[start] else np.zeros(end - start)
            assert np.array_equal(alone.offsets_T[start:end], expected)
    assert num_padded and gather_rows([], LAYOUT).ids_BT.shape == (0, 32)
