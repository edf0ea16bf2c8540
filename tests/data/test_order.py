import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmssl.data.order import (
    Mixture,
    Order,
    Stage,
    end_position,
    integer_shares,
    kept_position,
    permutation,
    skipped_before,
)
from lmssl.recipe.batches import BatchPlan

RANGES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5)
SHARES = st.lists(st.integers(1, 10**6), min_size=1, max_size=8)


@given(st.integers(0, 500), st.integers(0, 2**40), st.text(max_size=5))
def test_a_permutation_holds_every_index_once(count: int, seed: int, name: str) -> None:
    assert sorted(permutation(count, seed, name)) == list(range(count))


@given(st.integers(1, 300), st.integers(0, 2**40), st.lists(st.integers(0, 9) | st.text(max_size=3), max_size=3))
def test_a_permutation_is_a_function_of_its_key_and_has_an_inverse(count: int, seed: int, key: list[int | str]) -> None:
    order = permutation(count, seed, *key)
    inverse = np.argsort(order)
    assert (permutation(count, seed, *key) == order).all()
    assert (order[inverse] == np.arange(count)).all() and (inverse[order] == np.arange(count)).all()
    if count > 20:  # 1 in 20! would be a chance
        assert (permutation(count, seed + 1, *key) != order).any()
        assert (permutation(count, seed, *key, "more") != order).any()


def test_permutations_are_pinned() -> None:
    # A change here changes the order of every run in the world.
    assert permutation(8, 1, "units", "tales", 0).tolist() == [4, 1, 6, 0, 7, 2, 5, 3]


def test_every_part_of_the_key_matters() -> None:
    keys = [(1, "units", "a", 0), (2, "units", "a", 0), (1, "rows", "a", 0), (1, "units", "b", 0), (1, "units", "a", 1)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == len(keys)


def test_first_places_are_uniform() -> None:
    firsts = Counter(int(permutation(4, 3, epoch)[0]) for epoch in range(2000))
    assert all(400 < firsts[i] < 600 for i in range(4))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([0.7, 0.3], (7, 3)), ([1, 2], (1, 2)), ([1e-3, 1.0], (1, 1000)), ([0.1, 0.2, 3], (1, 2, 30))],
)
def test_shares_are_weights_as_written(weights: list[float], shares: tuple[int, ...]) -> None:
    found = integer_shares(weights)
    assert [a * shares[0] for a in found] == [b * found[0] for b in shares]


@given(SHARES, st.integers(1, 300), st.integers(0, 10**7))
def test_counts_are_exact_monotone_and_near_the_weights(shares: list[int], block_sequences: int, block: int) -> None:
    mixture = Mixture(shares, block_sequences, (0,))
    counts, later = mixture.count_before(block), mixture.count_before(block + 1)
    assert sum(counts) == block * block_sequences
    assert all(a <= b for a, b in zip(counts, later, strict=True))
    total = sum(shares)
    for count, share in zip(counts, shares, strict=True):
        assert abs(count * total - block * block_sequences * share) < 2 * total


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3).filter(any), st.integers(1, 300), st.integers(0, 10**7))
def test_up_to_three_corpora_stay_within_one_sequence(shares: list[int], block_sequences: int, block: int) -> None:
    mixture, total = Mixture(shares, block_sequences, (0,)), sum(shares)
    before, after = mixture.count_before(block), mixture.count_before(block + 1)
    used = sum(share > 0 for share in shares)
    for a, b, share in zip(before, after, shares, strict=True):
        ideal = Fraction(block * block_sequences * share, total)
        assert abs(a - ideal) <= Fraction(used - 1, 2)
        if used == 2:  # then a block alone is as exact
            assert abs(b - a - Fraction(block_sequences * share, total)) < 1


def test_mixtures_of_many_corpora_stay_within_about_one_sequence() -> None:
    draw = np.random.Generator(np.random.Philox(1))
    errors = []
    for _ in range(200):
        shares = integer_shares([round(float(weight), 3) for weight in draw.lognormal(0, 1, draw.integers(4, 13))])
        mixture, total = Mixture(shares, 1024, (0,)), sum(shares)
        for block in draw.integers(0, 10**6, 5).tolist():
            found = zip(mixture.count_before(block), shares, strict=True)
            errors += [abs(count - Fraction(block * 1024 * share, total)) for count, share in found]
    assert 0.5 < max(errors) < 1.2


@given(SHARES, st.integers(1, 40), st.integers(0, 2**32))
def test_positions_visit_each_corpus_in_order_without_gaps(shares: list[int], block_sequences: int, seed: int) -> None:
    mixture = Mixture(shares, block_sequences, (seed,))
    seen: list[list[int]] = [[] for _ in shares]
    for position in range(3 * block_sequences):
        assert mixture.counts_before(position) == tuple(map(len, seen))
        corpus, k = mixture.locate(position)
        seen[corpus].append(k)
    assert all(sorted(ks) == list(range(len(ks))) for ks in seen)


def test_corpora_are_mixed_inside_a_block() -> None:
    mixture = Mixture((1, 1), 1000, (5,))
    labels = [mixture.locate(position)[0] for position in range(1000)]
    assert 400 < sum(a != b for a, b in pairwise(labels)) < 600


def test_a_corpus_without_a_share_gets_nothing() -> None:
    mixture = Mixture((0, 3, 0, 1, 0), 8, (1,))
    assert mixture.count_before(2) == (0, 12, 0, 4, 0)
    assert {mixture.locate(position)[0] for position in range(16)} == {1, 3}


@given(RANGES)
def test_kept_positions_are_those_outside_the_ranges(gaps: list[tuple[int, int]]) -> None:
    skip, at = [], 0
    for gap, length in gaps:
        skip.append((at + gap, at + gap + length))
        at += gap + length
    left_out = {position for start, end in skip for position in range(start, end)}
    kept = [position for position in range(at + 20) if position not in left_out]
    assert [kept_position(k, skip) for k in range(len(kept))] == kept
    for position in range(at + 5):
        ranges = skipped_before(position, skip)
        assert {p for start, end in ranges for p in range(start, end)} == {p for p in left_out if p < position}
        assert all(end < start for (_, end), (start, _) in pairwise(ranges))  # ranges that touch are one


def test_corpora_in_use_are_those_of_this_and_the_next_stage() -> None:
    stages = [Stage(first, ("a", "b"), shares, 4, (0, 0)) for first, shares in ((0, (1, 0)), (8, (1, 0)), (16, (0, 1)))]
    order = Order(stages, seed=1)
    assert [order.in_use(position) for position in (7, 8, 16)] == [{"a"}, {"a", "b"}, {"b"}]


def test_a_later_stage_continues_the_counts() -> None:
    first = Stage(0, ("a", "b"), (1, 1), 4, (0, 0))
    second = Stage(10, ("b", "c"), (3, 1), 4, (5, 0))
    order = Order([first, second], seed=1)
    assert order.locate(9) in {("a", 4), ("b", 4)}
    places = [order.locate(position) for position in range(10, 14)]
    assert sorted(places) == [("b", 5), ("b", 6), ("b", 7), ("c", 0)]
    assert order.counts_before(14) == {"b": 8, "c": 1}


def test_a_stage_survives_json() -> None:
    stage = Stage(0, ("a", "b"), (10**30, 1), 4, (0, 0))
    assert Stage.from_json(json.loads(json.dumps(stage.to_json()))) == stage


def test_a_run_ends_behind_what_it_skips() -> None:
    plan = BatchPlan.even(4, num_steps=5)
    assert end_position(plan, []) == 20
    assert end_position(plan, [(3, 7), (30, 40)]) == 24  # the second lies beyond
    assert end_position(plan, [(3, 7), (23, 40)]) == 41
    assert end_position(BatchPlan.even(4), []) == 0
