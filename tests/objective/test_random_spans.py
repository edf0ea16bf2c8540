"""Span lengths are a cut geometric distribution, and the tiling has no beginning."""

from __future__ import annotations

import numpy as np
import pytest

from lmssl.objective.random_spans import SpanLengths, draw_spans


def test_span_lengths_of_spanbert() -> None:
    assert SpanLengths(5.0, 10).mean_tokens == pytest.approx(3.8, abs=0.01)  # the paper's number
    assert SpanLengths(1.0, 10).draw(np.linspace(0, 0.999, 50)).tolist() == [1] * 50
    uniform = np.random.default_rng(0).random(100_000)
    lengths = SpanLengths(3.0, 6)
    counts, expected = np.bincount(lengths.draw(uniform))[1:], lengths.probabilities * len(uniform)
    assert len(counts) == 6 and ((counts - expected) ** 2 / expected).sum() < 20.5  # 1 in 1000
    firsts = lengths.draw_first(uniform)
    assert firsts.max() == 6 and firsts.mean() > lengths.mean_tokens + 0.5  # long tiles hold more tokens


def test_spans_tile_a_row_from_a_random_place() -> None:
    lengths = SpanLengths(3.0, 10)
    uniform = np.random.default_rng(0).random((20_000, lengths.num_spans(40) + 1))
    starts, gaps = draw_spans(lengths, uniform, 40)
    expected = 1 / (lengths.mean_tokens + 1)
    error = np.sqrt(expected * (1 - expected) / len(uniform))
    assert np.abs(gaps.mean(axis=0) - expected).max() < 4.5 * error  # also at the row's ends
    edges = np.diff(np.pad(~gaps, ((0, 0), (1, 1))).astype(int), axis=1)
    sizes = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    assert sizes.min() == 1 and sizes.max() == 10
    assert (starts[:, 1:] == (gaps[:, 1:] | gaps[:, :-1])).all()
    extremes = np.zeros((1, lengths.num_spans(40) + 1))  # all of length 1
    extremes[:, 0] = 0.999
    assert draw_spans(lengths, extremes, 40)[1].sum() == 20
