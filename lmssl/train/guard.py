"""Which steps are out of line: a robust statistic over the steps before, and when to go back.

Every rank holds the same numbers and decides the same. A step's limits come from steps that ended at least one step
before it began: those the host has read without making the device wait, whatever is logged or saved in between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lmssl.recipe.guard import GuardSection

_TO_DEVIATION = 1.4826
"""Median absolute deviation -> standard deviation, of a normal distribution."""
_LEAST_RATIO = 0.01
"""Of the median: deviations smaller than this are taken for it, or equal numbers would leave no room at all."""


class RollBack(Exception):
    """The run goes back to its last good checkpoint and leaves out what it read since."""

    def __init__(self, from_step: int, skip: tuple[int, int], reason: str) -> None:
        super().__init__(reason)
        self.from_step = from_step
        self.skip = skip
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What a step may reach; infinity: anything."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def exceeded(self, loss: float, grad_norm: float) -> bool:
        """Whether finite numbers are above."""
        return math.isfinite(loss) and math.isfinite(grad_norm) and (loss > self.loss or grad_norm > self.grad_norm)


def limits(section: GuardSection, recent: Sequence[tuple[int, float, float]], *, next_step: int) -> Limits:
    """The limits of a step.

    Args:
        recent: (step from 0, loss, gradient norm) of finite steps, newest last.
        next_step: the step they are for, from 0.

    Source: OLMo-core's SkipStepOptimizer (6 standard deviations over 128 steps, of loss and gradient norm, from half a
    window on); differs in taking median and median absolute deviation, which spikes do not move, and in comparing
    logarithms of norms, whose tail is long.

    >>> calm = [(k, 3.0 + 0.01 * (k % 5), 0.5 + 0.01 * (k % 3)) for k in range(100)]
    >>> found = limits(GuardSection(), calm, next_step=101)
    >>> found.exceeded(3.05, 0.53), found.exceeded(30.0, 0.5), found.exceeded(3.0, 5.0)
    (False, True, True)
    """
    known = [(loss, norm) for step, loss, norm in recent if step <= next_step - 2][-section.window_steps :]
    if section.spike == "off" or len(known) < max(2, section.window_steps // 2):
        return Limits()
    losses = [loss for loss, _ in known]
    norms = [math.log(max(norm, 1e-30)) for _, norm in known]
    loss_limit = _above(losses, section.deviations, least=_LEAST_RATIO * abs(statistics.median(losses)))
    return Limits(loss_limit, math.exp(min(700.0, _above(norms, section.deviations, least=_LEAST_RATIO))))


def _above(values: Sequence[float], deviations: float, *, least: float) -> float:
    middle = statistics.median(values)
    deviation = _TO_DEVIATION * statistics.median(abs(value - middle) for value in values)
    return middle + deviations * max(deviation, least)


def merged(skip: Sequence[tuple[int, int]], more: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Two lists of half-open ranges as one, sorted and apart.

    >>> merged([(0, 4), (10, 12)], [(3, 6), (12, 14)])
    ((0, 6), (10, 14))
    """
    found: list[tuple[int, int]] = []
    for start, end in sorted([*skip, *more]):
        if found and start <= found[-1][1]:
            start, last = found.pop()
            end = max(end, last)
        found.append((start, end))
    return tuple(found)
