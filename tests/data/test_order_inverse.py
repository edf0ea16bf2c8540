from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmssl.data.order import Mixture, Order, Stage

SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


@given(SHARES, st.integers(1, 40), st.integers(0, 3000))
def test_mixture_positions_invert_locate(shares: list[int], block_sequences: int, position: int) -> None:
    mixture = Mixture(shares, block_sequences, (1, "x"))
    corpus, k = mixture.locate(position)
    assert mixture.position_of(corpus, k) == position


@given(SHARES, st.integers(1, 40))
def test_every_sequence_has_one_position(shares: list[int], block_sequences: int) -> None:
    mixture = Mixture(shares, block_sequences, (1, "x"))
    counts = mixture.counts_before(200)
    found = [mixture.position_of(corpus, k) for corpus, count in enumerate(counts) for k in range(count)]
    assert sorted(position for position in found if position is not None) == list(range(200))
    for corpus, share in enumerate(shares):
        assert mixture.position_of(corpus, -1) is None
        assert (mixture.position_of(corpus, counts[corpus]) is None) == (not share)


def test_order_positions_invert_locate_across_stages() -> None:
    first = Stage(0, ("a", "b"), (3, 1), 16, (0, 0))
    counts = Order([first], 5).counts_before(100)
    second = Stage(100, ("a", "b", "c"), (0, 2, 1), 16, (counts["a"], counts["b"], 0))
    order = Order([first, second], 5)
    for position in range(300):
        assert order.position_of(*order.locate(position)) == position
    assert order.position_of("a", counts["a"]) is None  # its share ended
    assert order.position_of("c", 10**6) is not None
    assert order.position_of("d", 0) is None
