"""Who builds a chunk when several want it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmssl.data.cache import Claim
from lmssl.data.cancel import Busy
from lmssl.data.chunk import Chunk
from lmssl.data.corpus import Unit, read_chunks


def test_a_claim_is_built_once_by_whoever_holds_it(open_cache: Any, unit: Unit) -> None:
    cache, other = open_cache(), open_cache()
    claim = cache.claim(unit, 0)
    assert isinstance(claim, Claim) and (claim.is_new, claim.is_last) == (True, True)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(other.claim(unit, 0)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    chunk = claim.build()
    waiting.join(10)
    assert [type(it) for it in found] == [Chunk] and found[0].meta == chunk.meta
    assert (cache.num_built, other.num_built) == (1, 0)


def test_what_others_have_in_work_is_passed_over(open_cache: Any, unit: Unit) -> None:
    """A unit of several chunks, read in order: its second is in work elsewhere."""
    alone = open_cache()
    in_order = replace(unit, chunk_bytes=unit.num_bytes // 4)
    cache, other = open_cache(), open_cache()
    held = other.claim(in_order, 1)
    assert isinstance(held, Claim)
    first = cache.claim(in_order, 0, wait=False)
    assert isinstance(first, Claim)
    first.build()
    with pytest.raises(Busy):
        cache.claim(in_order, 1, wait=False)
    assert cache.read_past(in_order, 1) is False
    third = cache.claim(in_order, 2, wait=False)
    assert isinstance(third, Claim)
    third.build()
    held.build()
    assert cache.peek(in_order, 1) is not None
    texts = list(read_chunks(in_order, max_bad_records=0))
    counts = [alone.get(in_order, index).meta.num_documents for index in range(len(texts))]
    assert counts == [len(text.documents) for text in texts] and len(texts) > 3
    assert (cache.num_built, other.num_built, alone.num_built) == (2, 1, len(texts) - 3)


def test_a_unit_of_one_chunk_is_not_read_to_be_passed_over(open_cache: Any, unit: Unit) -> None:
    held = open_cache().claim(unit, 0)
    cache = open_cache()
    Path(unit.parts[0].path).unlink()
    with pytest.raises(Busy):
        cache.claim(unit, 0, wait=False)
    assert cache.read_past(unit, 0)
    del held


def test_a_claim_that_is_dropped_lets_others_build(open_cache: Any, unit: Unit) -> None:
    claim = open_cache().claim(unit, 0)
    assert isinstance(claim, Claim)
    del claim
    gc.collect()
    assert open_cache().get(unit, 0).meta.num_documents == 50
