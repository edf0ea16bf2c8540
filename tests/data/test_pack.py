from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmssl.data import python_docs
from lmssl.data.pack import PACKINGS, Packing, pack_best_fit, pack_concat, pack_none
from lmssl.data.records import Record

LENGTHS = st.lists(st.integers(0, 90), max_size=60)
SEQUENCE_LENGTHS = st.integers(1, 40)


def check(packing: Packing, lengths: list[int], sequence_length: int) -> None:
    """Every token once, in its document's order; sequences neither empty nor too long."""
    tokens: list[set[int]] = [set() for _ in lengths]
    for document, start, length in zip(packing.documents, packing.starts, packing.lengths, strict=True):
        piece = set(range(start, start + length))
        assert length > 0
        assert not piece & tokens[document]
        tokens[document] |= piece
    assert [len(found) for found in tokens] == lengths
    assert all(not found or max(found) == len(found) - 1 for found in tokens)
    for a, b in pairwise(packing.offsets):
        assert 0 < packing.lengths[a:b].sum() <= sequence_length
    assert packing.num_padding == packing.num_sequences * sequence_length - sum(lengths)


@pytest.mark.parametrize("kind", PACKINGS)
@given(lengths=LENGTHS, sequence_length=SEQUENCE_LENGTHS)
def test_every_token_is_packed_once(kind: str, lengths: list[int], sequence_length: int) -> None:
    check(PACKINGS[kind](lengths, sequence_length), lengths, sequence_length)


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_best_fit_never_cuts_what_fits(lengths: list[int], sequence_length: int) -> None:
    packing = pack_best_fit(lengths, sequence_length)
    pieces = np.bincount(packing.documents, minlength=len(lengths))
    assert all(count == 1 for count, length in zip(pieces, lengths, strict=True) if 0 < length <= sequence_length)


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_best_fit_fills_gaps_as_long_as_there_are_bodies(lengths: list[int], sequence_length: int) -> None:
    packing = pack_best_fit(lengths, sequence_length)
    whole = [
        packing.lengths[a] == sequence_length and lengths[packing.documents[a]] > sequence_length
        for a, b in pairwise(packing.offsets)
        if b == a + 1
    ]
    if any(whole):  # a body was left over, so no gap was
        assert packing.num_padding < sequence_length


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 40))
def test_best_fit_is_best_fit_decreasing(lengths: list[int], sequence_length: int) -> None:
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else sequence_length) - length)
    packing = pack_best_fit(lengths, sequence_length)
    used = np.add.reduceat(packing.lengths, packing.offsets[:-1])
    assert sorted(sequence_length - used) == sorted(spaces)


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_no_two_sequences_of_best_fit_could_be_one(lengths: list[int], sequence_length: int) -> None:
    packing = pack_best_fit(lengths, sequence_length)
    used = sorted(packing.lengths[a:b].sum() for a, b in pairwise(packing.offsets))
    assert all(a + b > sequence_length for a, b in pairwise(used))
    # So at most one sequence is less than half full, and without cuts no packing needs half as many.
    assert packing.num_sequences < 2 * sum(lengths) / sequence_length + 1


@pytest.fixture(scope="module")
def docstring_tokens() -> Any:
    """Lengths as python_docs has them, at four bytes a token: the language reference and every twelfth module."""
    paths = python_docs.list_files()
    paths = [path for number, path in enumerate(paths) if number % 12 == 0 or path.endswith("topics.py")]
    records = (item for path in paths for item in python_docs.read_docs(path))
    return np.array([len(item.raw) // 4 + 1 for item in records if isinstance(item, Record)])


@pytest.mark.parametrize("sequence_length", [512, 2048, 8192])
def test_padding_in_windows_of_a_thousand_sequences(docstring_tokens: Any, sequence_length: int) -> None:
    draw = np.random.default_rng(sequence_length)
    count = 1000 * sequence_length // int(docstring_tokens.mean()) + 1000
    lengths = draw.choice(docstring_tokens, count)
    assert lengths.max() > 2048 > 100 > np.median(lengths)
    packing = pack_best_fit(lengths, sequence_length)
    assert packing.num_sequences >= 1000 and packing.padding_ratio <= 0.002
    assert (np.bincount(packing.documents)[lengths <= sequence_length] == 1).all()


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_best_fit_pads_no_more_than_one_sequence_per_document(lengths: list[int], sequence_length: int) -> None:
    best, none = pack_best_fit(lengths, sequence_length), pack_none(lengths, sequence_length)
    assert best.num_sequences <= none.num_sequences
    assert -(-sum(lengths) // sequence_length) <= best.num_sequences


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_concat_pads_the_last_sequence_alone(lengths: list[int], sequence_length: int) -> None:
    packing = pack_concat(lengths, sequence_length)
    assert packing.num_padding < sequence_length
    assert packing.num_sequences == -(-sum(lengths) // sequence_length)
    assert list(packing.documents) == sorted(packing.documents)


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_none_puts_one_piece_in_a_sequence(lengths: list[int], sequence_length: int) -> None:
    packing = pack_none(lengths, sequence_length)
    assert (np.diff(packing.offsets) == 1).all()


def test_segments_of_a_sequence_stand_in_the_order_of_documents() -> None:
    packing = pack_best_fit([3, 5, 2], 10)
    assert packing.documents.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", PACKINGS)
@given(lengths=LENGTHS, sequence_length=SEQUENCE_LENGTHS)
def test_starts_come_first_wherever_there_are_any(kind: str, lengths: list[int], sequence_length: int) -> None:
    plain = PACKINGS[kind](lengths, sequence_length)
    packing = plain.with_starts_first()
    check(packing, lengths, sequence_length)
    num_aligned = 0
    for a, b in pairwise(packing.offsets):
        starts = packing.starts[a:b] == 0
        assert starts.tolist() == sorted(starts.tolist(), reverse=True)
        num_aligned += bool(starts[0])
        pieces = [
            set(zip(p.documents[a:b].tolist(), p.starts[a:b].tolist(), p.lengths[a:b].tolist(), strict=True))
            for p in (plain, packing)
        ]
        assert pieces[0] == pieces[1]
        inside = packing.documents[a:b][~starts]
        assert inside.tolist() == sorted(inside.tolist())
        if kind == "best_fit" and not starts[0]:
            assert all(lengths[document] > sequence_length for document in packing.documents[a:b])
    assert packing.num_aligned == num_aligned >= plain.num_aligned


def test_most_sequences_begin_with_a_document_when_starts_come_first() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).lognormal(5.5, 1.2, 5000).astype(int) + 1
    best, concat = pack_best_fit(lengths, 1024), pack_concat(lengths, 1024)
    share = {
        "best_fit": best.num_aligned / best.num_sequences,
        "best_fit aligned": best.with_starts_first().num_aligned / best.num_sequences,
        "concat": concat.num_aligned / concat.num_sequences,
        "concat aligned": concat.with_starts_first().num_aligned / concat.num_sequences,
    }
    assert share["concat"] < 0.01 and share["concat aligned"] > 0.7
    assert share["best_fit aligned"] > 0.8 > share["best_fit"]


def test_counts() -> None:
    packing = pack_best_fit([25, 3], 10)
    assert (packing.num_sequences, packing.num_padding, packing.num_cut_documents) == (3, 2, 1)
    assert packing.padding_ratio == pytest.approx(2 / 30)
    assert pack_best_fit([], 10).padding_ratio == 0.0


def test_the_biggest_gap_is_filled_first() -> None:
    # Gaps of 3, 4 and 2 beside two bodies of 10: they hold 9 tokens, too few for a body.
    packing = pack_best_fit([7, 6, 8, 20], 10)
    assert packing.num_cut_documents == 1 and packing.num_padding == 9
    # One token more of gap, and the first body fills the biggest gaps.
    packing = pack_best_fit([7, 6, 7, 20], 10)
    assert packing.num_padding == 0
    pieces = [
        (int(s), int(n)) for d, s, n in zip(packing.documents, packing.starts, packing.lengths, strict=True) if d == 3
    ]
    assert sorted(pieces) == [(0, 4), (4, 3), (7, 3), (10, 10)]


def test_padding_is_small_on_text_like_lengths() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).lognormal(5.5, 1.2, 5000).astype(int) + 1
    assert pack_best_fit(lengths, 1024).padding_ratio < 0.002
    assert pack_none(lengths, 1024).padding_ratio > 0.4
