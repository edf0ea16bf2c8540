"""Learning rates are pure functions of the tokens seen."""

from __future__ import annotations

import itertools
import math

import pytest

from lmssl.optim.schedule import lr_ratio
from lmssl.recipe.sections import CosineSchedule, LinearSchedule, WsdSchedule

WSD = WsdSchedule(kind="wsd", warmup_tokens=100, decay_ratio=0.2, min_lr_ratio=0.1)
COSINE = CosineSchedule(kind="cosine", warmup_tokens=100, min_lr_ratio=0.1)
LINEAR = LinearSchedule(kind="linear", warmup_tokens=100, min_lr_ratio=0.1)


def at(schedule: WsdSchedule | CosineSchedule | LinearSchedule, tokens: int) -> float:
    return lr_ratio(schedule, tokens_seen=tokens, total_tokens=1000)


@pytest.mark.parametrize("schedule", [WSD, COSINE, LINEAR])
def test_warms_up_from_near_zero_and_ends_at_the_floor(schedule: WsdSchedule) -> None:
    assert at(schedule, 0) == 1e-3
    assert at(schedule, 50) == 0.5
    assert at(schedule, 100) == 1.0
    assert at(schedule, 1000) == pytest.approx(0.1)


def test_wsd_is_flat_until_the_decay() -> None:
    assert [at(WSD, t) for t in (100, 500, 800)] == [1.0, 1.0, 1.0]
    assert at(WSD, 900) == pytest.approx(0.55)


def test_cosine_and_linear_halfway() -> None:
    assert at(COSINE, 550) == pytest.approx(0.55)
    assert at(LINEAR, 550) == pytest.approx(0.55)
    assert at(COSINE, 325) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("schedule", [WSD, COSINE, LINEAR])
def test_never_rises_after_warmup_and_stays_in_bounds(schedule: WsdSchedule) -> None:
    rates = [at(schedule, t) for t in range(100, 1001)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert all(0.1 - 1e-12 <= r <= 1 for r in rates)


def test_no_warmup_and_no_decay() -> None:
    flat = WsdSchedule(kind="wsd", decay_ratio=0.0)
    assert [lr_ratio(flat, tokens_seen=t, total_tokens=10) for t in (0, 5, 9)] == [1.0, 1.0, 1.0]
