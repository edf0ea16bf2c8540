"""Learning rates are pure functions of the tokens seen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lmssl.optim.schedule import in_decay, lr_ratio, momentum_at, spent_ratio
from lmssl.recipe.optim import AdamW, MomentumWarmup, Muon
from lmssl.recipe.schedule import (
    AnySchedule,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    WsdSchedule,
)

WSD = WsdSchedule(kind="wsd", warmup_tokens=100, decay_ratio=0.2, min_lr_ratio=0.1)
COSINE = CosineSchedule(kind="cosine", warmup_tokens=100, min_lr_ratio=0.1)
LINEAR = LinearSchedule(kind="linear", warmup_tokens=100, min_lr_ratio=0.1)


def at(schedule: AnySchedule, tokens: int) -> float:
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


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_every_decay_begins_at_the_peak_and_ends_at_the_floor(decay: Any, halfway: float) -> None:
    wsd = WsdSchedule(kind="wsd", warmup_tokens=100, decay_ratio=0.4, decay=decay, min_lr_ratio=0.1)
    assert [at(wsd, t) for t in (100, 599, 600)] == [1.0, 1.0, pytest.approx(1.0)]
    assert at(wsd, 800) == pytest.approx(0.1 + 0.9 * halfway)
    assert at(wsd, 1000) == pytest.approx(0.1)
    rates = [at(wsd, t) for t in range(600, 1001)]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_one_minus_sqrt_falls_first() -> None:
    wsd = WsdSchedule(kind="wsd", decay_ratio=1.0, decay="1-sqrt")
    assert at(wsd, 250) == pytest.approx(0.5)


def test_inverse_sqrt_is_the_square_root_of_tokens_and_has_a_floor() -> None:
    schedule = InverseSqrtSchedule(kind="inverse_sqrt", warmup_tokens=100, min_lr_ratio=0.4)
    assert [at(schedule, t) for t in (0, 50, 100)] == [1e-3, 0.5, 1.0]
    assert at(schedule, 400) == pytest.approx(0.5)
    assert at(schedule, 1000) == 0.4


def test_constant_stays() -> None:
    schedule = ConstantSchedule(kind="constant", warmup_tokens=100)
    assert [at(schedule, t) for t in (50, 100, 999)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [WSD, COSINE, LINEAR])
def test_the_budget_that_is_used_up_more_decides(schedule: AnySchedule) -> None:
    def timed(tokens: int, spent: float) -> float:
        return lr_ratio(schedule, tokens_seen=tokens, total_tokens=1000, spent_ratio=spent)

    assert timed(300, 0.1) == at(schedule, 300)
    assert timed(300, 0.9) == at(schedule, 900)
    assert timed(300, 1.0) == pytest.approx(0.1)
    assert timed(950, 0.9) == at(schedule, 950)
    assert timed(50, 0.2) == 0.5  # a warmup is of tokens
    assert timed(50, 0.99) == pytest.approx(at(schedule, 990))


def test_a_share_of_hours() -> None:
    assert spent_ratio(3600.0, None) == 0.0
    assert spent_ratio(3600.0, 4.0) == 0.25
    assert spent_ratio(1e9, 4.0) == 1.0


def test_in_decay_says_when_a_branch_is_too_late() -> None:
    assert [in_decay(WSD, tokens_seen=t, total_tokens=1000) for t in (700, 800, 801)] == [False, False, True]


def test_momentum_warms_up_with_tokens_and_adamw_has_none() -> None:
    warmup = MomentumWarmup(from_momentum=0.85, tokens=1000)
    muon = Muon(kind="muon", lr=0.01, momentum=0.95, momentum_warmup=warmup)
    assert momentum_at(muon, tokens_seen=250) == pytest.approx(0.875)
    assert momentum_at(Muon(kind="muon", lr=0.01), tokens_seen=0) == 0.95
    assert momentum_at(AdamW(kind="adamw", lr=0.01), tokens_seen=0) is None
