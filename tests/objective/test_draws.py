"""Numbers by key."""

from __future__ import annotations

import numpy as np

from lmssl.objective.draws import uniforms


def test_uniform_and_apart() -> None:
    found = uniforms(10_000, 1, "test", 5)
    assert found.min() >= 0
    assert found.max() < 1
    counts, _ = np.histogram(found, bins=10, range=(0, 1))
    assert abs(counts - 1000).max() < 120  # standard deviation 30
    assert not (uniforms(100, 1, "test", 6) == found[:100]).any()
    assert not (uniforms(100, 2, "test", 5) == found[:100]).any()


def test_the_same_on_every_machine() -> None:
    assert uniforms(2, 1, "test", 5).tolist() == [0.7775433324440496, 0.21972678505032417]
