"""Learning-rate schedules as pure functions of the tokens seen."""

from __future__ import annotations

import math

from lmssl.recipe.sections import AnySchedule, CosineSchedule, LinearSchedule, WsdSchedule


def lr_ratio(schedule: AnySchedule, *, tokens_seen: int, total_tokens: int) -> float:
    """Learning rate / peak for the step that begins after `tokens_seen` tokens.

    Keyed on tokens, so batch size, world size and resuming leave it alone. The first step of a warmup has a rate of a
    thousandth of the peak rather than none, so that no batch is read in vain.

    Args:
        tokens_seen: tokens consumed before the step, in [0, total_tokens].
        total_tokens: the run's budget.
    Source: wsd is MiniCPM's (Hu et al. 2024) with a linear decay, as Hägele et al. 2024 recommend.

    >>> from lmssl.recipe.sections import WsdSchedule
    >>> wsd = WsdSchedule(kind="wsd", warmup_tokens=100, decay_ratio=0.5)
    >>> [round(lr_ratio(wsd, tokens_seen=t, total_tokens=1000), 3) for t in (50, 100, 500, 750, 1000)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if tokens_seen < schedule.warmup_tokens:
        return max(1e-3, tokens_seen / schedule.warmup_tokens)
    after_warmup = max(1, total_tokens - schedule.warmup_tokens)
    progress = min(1.0, (tokens_seen - schedule.warmup_tokens) / after_warmup)
    low = schedule.min_lr_ratio
    match schedule:
        case WsdSchedule():
            decay_tokens = max(1.0, schedule.decay_ratio * total_tokens)
            left = (total_tokens - tokens_seen) / decay_tokens
            return low + (1 - low) * min(1.0, max(0.0, left))
        case CosineSchedule():
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        case LinearSchedule():
            return low + (1 - low) * (1 - progress)
