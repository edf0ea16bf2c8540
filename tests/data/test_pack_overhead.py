"""Segments with special tokens around each, however a document is cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmssl.data.pack import PACKINGS, IntArray, Packing, pack_best_fit, pack_concat, pack_none

LENGTHS = st.lists(st.integers(0, 400), max_size=60)
SEQUENCE_LENGTHS = st.integers(8, 128)
OVERHEADS = st.integers(0, 3)


def draw_lengths(kind: str, length: int, num_tokens: int) -> IntArray:
    """Documents of some distribution, of at least `num_tokens` tokens in all."""
    draw = np.random.Generator(np.random.Philox(1))
    count = 60_000
    found = {
        "prose": lambda: draw.lognormal(5.5, 1.2, count),
        "long tail": lambda: 50 * (1 + draw.pareto(1.1, count)),
        "short": lambda: draw.integers(1, 400, count),
        "a little more than half": lambda: np.where(draw.random(count) < 0.8, 0.6 * length, 10 * length),
        "all cut": lambda: draw.uniform(1.5 * length, 3 * length, count),
        "books": lambda: draw.lognormal(11, 1, count),
        "sections": lambda: draw.normal(15_000, 300, count),
    }[kind]()
    lengths = np.clip(found.astype(np.int64), 1, 400 * length)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]


def own_tokens(packing: Packing, overhead: int) -> list[list[tuple[int, int]]]:
    """Of each document the stretches of its tokens that segments hold, in its order."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(packing.num_documents)]
    for document, start, length in zip(packing.documents, packing.starts, packing.lengths, strict=True):
        found[document].append((int(start), int(start + length - overhead)))
    return [sorted(stretches) for stretches in found]


def check(packing: Packing, lengths: list[int] | IntArray, sequence_length: int, overhead: int) -> None:
    """Every token of a document in one segment; none without; sequences neither empty nor too long."""
    for stretches, length in zip(own_tokens(packing, overhead), lengths, strict=True):
        assert all(start < stop for start, stop in stretches)
        assert [0, *(stop for _, stop in stretches)] == [*(start for start, _ in stretches), length]
    for a, b in pairwise(packing.offsets):
        assert overhead < packing.lengths[a:b].sum() <= sequence_length
    num_tokens = sum(lengths) + overhead * len(packing.documents)
    assert packing.num_padding == packing.num_sequences * sequence_length - num_tokens


@pytest.mark.parametrize("kind", PACKINGS)
@given(lengths=LENGTHS, sequence_length=SEQUENCE_LENGTHS, overhead=OVERHEADS)
@example(lengths=[], sequence_length=8, overhead=3)
@example(lengths=[0, 0], sequence_length=8, overhead=3)
@example(lengths=[5, 0, 5, 1, 5], sequence_length=8, overhead=3)
def test_every_token_is_packed_once(kind: str, lengths: list[int], sequence_length: int, overhead: int) -> None:
    packing = PACKINGS[kind](lengths, sequence_length, overhead)
    check(packing, lengths, sequence_length, overhead)
    check(packing.with_starts_first(), lengths, sequence_length, overhead)


@given(LENGTHS, SEQUENCE_LENGTHS, OVERHEADS)
def test_best_fit_never_cuts_what_fits_with_its_overhead(
    lengths: list[int], sequence_length: int, overhead: int
) -> None:
    packing = pack_best_fit(lengths, sequence_length, overhead)
    pieces = np.bincount(packing.documents, minlength=len(lengths))
    for count, length in zip(pieces, lengths, strict=True):
        assert count == bool(length) if length <= sequence_length - overhead else count > 1


@given(LENGTHS, SEQUENCE_LENGTHS, st.integers(1, 3))
def test_best_fit_fills_gaps_of_eight_tokens_as_long_as_there_are_bodies(
    lengths: list[int], sequence_length: int, overhead: int
) -> None:
    packing = pack_best_fit(lengths, sequence_length, overhead)
    full = np.flatnonzero(np.diff(packing.offsets) == 1)
    alone = packing.offsets[full]
    capacity = sequence_length - overhead
    kept = (packing.lengths[alone] == sequence_length) & (packing.starts[alone] % capacity == 0)
    if (kept & (np.array(lengths, dtype=int)[packing.documents[alone]] > capacity)).any():
        used = np.bincount(packing.sequences, packing.lengths)
        wide = sequence_length - used
        wide = wide[wide >= overhead + 8]
        # What is left is too little for one more body: its tokens, and an overhead at both of its ends.
        assert (wide - overhead).sum() < capacity + overhead * (2 + len(packing.documents))


def test_a_gap_is_filled_from_eight_tokens_on() -> None:
    # Four gaps beside two bodies of 28 tokens: room for 4 x 7 tokens is left alone, room for 4 x 8 takes a body.
    for gap, num_padding in ((9, 4 * 9), (10, 4 * 10 - 28 - 4 * 2)):
        lengths = [28 - gap] * 4 + [2 * 28]
        packing = pack_best_fit(lengths, 30, 2)
        check(packing, lengths, 30, 2)
        assert packing.num_padding == num_padding


@pytest.mark.parametrize("overhead", [1, 2, 3])
def test_no_remainder_is_shorter_than_eight_tokens(overhead: int) -> None:
    for length in range(1, 200):
        (pieces,) = own_tokens(pack_best_fit([length], 32, overhead), overhead)
        assert len(pieces) == -(-length // (32 - overhead))
        assert all(stop - start >= min(8, length) for start, stop in pieces)


def test_what_fills_gaps_is_cut_at_their_ends_alone() -> None:
    # Ten gaps for 17 tokens, and one document of four bodies of 38: no cut where one body ends in the midst of a gap.
    lengths = [19] * 10 + [4 * 38]
    packing = pack_best_fit(lengths, 40, 2)
    check(packing, lengths, 40, 2)
    assert packing.num_sequences == 10
    assert [start for start, _ in own_tokens(packing, 2)[10]] == [*range(0, 4 * 38, 17)]


@given(LENGTHS, SEQUENCE_LENGTHS, st.integers(1, 3))
def test_concat_keeps_the_order_and_pads_two_overheads_at_most(
    lengths: list[int], sequence_length: int, overhead: int
) -> None:
    packing = pack_concat(lengths, sequence_length, overhead)
    assert list(packing.documents) == sorted(packing.documents)
    used = np.bincount(packing.sequences, packing.lengths)
    assert (sequence_length - used[:-1] <= 2 * overhead).all()


@given(LENGTHS, SEQUENCE_LENGTHS, OVERHEADS)
def test_none_cuts_a_document_into_full_sequences(lengths: list[int], sequence_length: int, overhead: int) -> None:
    packing = pack_none(lengths, sequence_length, overhead)
    assert (np.diff(packing.offsets) == 1).all()
    capacity = sequence_length - overhead
    assert packing.num_sequences == sum(-(-length // capacity) for length in lengths)
    assert (packing.starts % capacity == 0).all()


@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("kind", ["prose", "long tail", "short", "a little more than half", "all cut", "sections"])
def test_padding_is_tiny_in_windows_of_a_thousand_sequences(kind: str, length: int) -> None:
    lengths = draw_lengths(kind, length, 1200 * length)
    for overhead in (2, 3):
        packing = pack_best_fit(lengths, length, overhead)
        assert packing.num_sequences > 1000
        assert packing.padding_ratio < 0.002
        assert pack_concat(lengths, length, overhead).padding_ratio < 0.002


@pytest.mark.parametrize("kind", ["prose", "long tail", "short", "all cut", "books"])
def test_padding_is_small_in_short_sequences_too(kind: str) -> None:
    lengths = draw_lengths(kind, 128, 1200 * 128)
    for overhead in (2, 3):
        # Gaps for fewer than 8 tokens are a bigger part of these.
        assert pack_best_fit(lengths, 128, overhead).padding_ratio < 0.005
