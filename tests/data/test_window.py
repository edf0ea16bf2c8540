from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units
from lmssl.data.window import Layout, OpenWindows, Window, WindowPlan
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


def test_a_chunk_that_vanished(plan: WindowPlan) -> None:
    (plan.chunks[0] / "meta.json").unlink()
    with pytest.raises(DataError, match="removed or damaged during the run") as caught:
        Window(plan, LAYOUT)
    assert caught.value.where == str(plan.chunks[0])


def test_row_arrays_are_whole_after_reuse(plan: WindowPlan) -> None:
    window = Window(plan, LAYOUT)
    ids, segments, offsets = np.full(32, 99), np.full(32, 99, np.int32), np.full(32, 99)
    fill: Callable[..., float] = window.gather_into
    for index in range(window.num_sequences):
        fill(index, ids, segments, offsets)
        fresh = window.gather(index)
        assert np.array_equal(ids, fresh.ids_T)
        assert np.array_equal(segments, fresh.segments_T) and np.array_equal(offsets, fresh.offsets_T)
