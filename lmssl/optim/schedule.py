"""Learning rate and momentum as pure functions of the tokens seen, and of the time spent where that is limited."""

from __future__ import annotations

import math

from lmssl.recipe.optim import AdamW, Muon
from lmssl.recipe.schedule import (
    AnySchedule,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    WsdSchedule,
)


def lr_ratio(schedule: AnySchedule, *, tokens_seen: int, total_tokens: int, spent_ratio: float = 0.0) -> float:
    """Learning rate / peak for the step that begins after `tokens_seen` tokens.

    Keyed on tokens, so batch size, world size and resuming leave it alone. The first step of a warmup has a rate of a
    thousandth of the peak rather than none, so that no batch is read in vain.

    Where hours are limited as well, what follows the warmup is as far as the budget that is used up more: a run that is
    too slow for its tokens decays with its time. Ranks must give the same `spent_ratio`, or they part.

    Args:
        tokens_seen: tokens consumed before the step, in [0, total_tokens].
        total_tokens: the run's budget.
        spent_ratio: hours of training so far, those of earlier sessions included / `train.max_hours`, in [0, 1], agreed
            over ranks; 0 without such a limit.
    Source: wsd is MiniCPM's (Hu et al. 2024); of its decays, linear and 1-sqrt are those that Hägele et al. 2024
    recommend. inverse_sqrt is that of Vaswani et al. 2017, in tokens.

    >>> from lmssl.recipe.schedule import WsdSchedule
    >>> wsd = WsdSchedule(kind="wsd", warmup_tokens=100, decay_ratio=0.5)
    >>> [round(lr_ratio(wsd, tokens_seen=t, total_tokens=1000), 3) for t in (50, 100, 500, 750, 1000)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    >>> lr_ratio(wsd, tokens_seen=300, total_tokens=1000, spent_ratio=0.75)
    0.5
    """
    reached = max(tokens_seen, spent_ratio * total_tokens)
    after_warmup = _after_warmup(schedule, reached, total_tokens)
    if tokens_seen < schedule.warmup_tokens:
        return min(max(1e-3, tokens_seen / schedule.warmup_tokens), after_warmup)
    return after_warmup


def _after_warmup(schedule: AnySchedule, reached: float, total_tokens: int) -> float:
    progress = (reached - schedule.warmup_tokens) / max(1, total_tokens - schedule.warmup_tokens)
    progress = min(1.0, max(0.0, progress))
    match schedule:
        case ConstantSchedule():
            return 1.0
        case InverseSqrtSchedule():
            return max(schedule.min_lr_ratio, math.sqrt(schedule.warmup_tokens / max(reached, schedule.warmup_tokens)))
        case WsdSchedule():
            decay_tokens = max(1.0, schedule.decay_ratio * total_tokens)
            fallen = _decay(schedule, min(1.0, max(0.0, (total_tokens - reached) / decay_tokens)))
        case CosineSchedule():
            fallen = 0.5 * (1 + math.cos(math.pi * progress))
        case LinearSchedule():
            fallen = 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fallen


def _decay(schedule: WsdSchedule, left: float) -> float:
    """What is left of the rate when `left` of the decay is still to come: 1 at 1, 0 at 0."""
    if schedule.decay == "1-sqrt":
        return 1 - math.sqrt(1 - left)
    if schedule.decay == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left


def spent_ratio(seconds: float, max_hours: float | None) -> float:
    """The share of `train.max_hours` that is used up after so many seconds of training, at most 1; 0 without a limit.

    The run is over once it is 1; what the last steps cost more than the others is beyond the limit.

    Args:
        seconds: of all sessions, the same on every rank.

    >>> spent_ratio(5400, 2.0), spent_ratio(9000, 2.0), spent_ratio(5400, None)
    (0.75, 1.0, 0.0)
    """
    return 0.0 if max_hours is None else min(1.0, seconds / (3600 * max_hours))


def in_decay(schedule: WsdSchedule, *, tokens_seen: int, total_tokens: int) -> bool:
    """Whether the decay of a run has begun after so many tokens."""
    return total_tokens - tokens_seen < schedule.decay_ratio * total_tokens


def momentum_at(section: AdamW | Muon, *, tokens_seen: int) -> float | None:
    """Muon's momentum for the step that begins after `tokens_seen` tokens; None: the optimiser has none.

    Source: the warmup from 0.85 is of modded-nanogpt (Jordan et al. 2024).

    >>> from lmssl.recipe.optim import MomentumWarmup
    >>> warmup = MomentumWarmup(from_momentum=0.85, tokens=1000)
    >>> muon = Muon(kind="muon", lr=0.01, momentum=0.95, momentum_warmup=warmup)
    >>> [round(momentum_at(muon, tokens_seen=tokens), 3) for tokens in (0, 500, 1000, 9000)]
    [0.85, 0.9, 0.95, 0.95]
    """
    if isinstance(section, AdamW):
        return None
    warmup = section.momentum_warmup
    if warmup is None:
        return section.momentum
    share = min(1.0, tokens_seen / warmup.tokens)
    return warmup.from_momentum + share * (section.momentum - warmup.from_momentum)
