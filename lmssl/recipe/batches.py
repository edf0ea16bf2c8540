"""Which positions a step reads: batches of one size, or growing ones, over sequences of one length or several.

Everything that turns a step into positions or tokens, or back, asks a `BatchPlan`. Positions are counted here as if
`data.skip` left out none: position k is the k-th kept one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd


@dataclass(frozen=True)
class Span:
    """Steps in a row of one size."""

    first_step: int
    first_position: int
    first_tokens: int
    """Tokens of the steps before."""
    num_sequences: int
    """Of each of its steps, over all devices."""
    sequence_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of each of its steps."""
        return self.num_sequences * self.sequence_length


class BatchPlan:
    """The steps of a run, from 0 on; a step that is asked about may lie beyond the last."""

    def __init__(self, spans: Sequence[Span], tokens: int) -> None:
        """Args: `spans` in order, the last without end; `tokens`: the budget, rounded up to whole steps."""
        self.spans = tuple(spans)
        self._steps = [span.first_step for span in spans]
        self._positions = [span.first_position for span in spans]
        self._tokens = [span.first_tokens for span in spans]
        self.num_steps = self.step_at_token(tokens - 1) + 1 if tokens else 0
        """Steps of the run."""

    @classmethod
    def even(cls, num_sequences: int, *, sequence_length: int = 1, num_steps: int = 0) -> BatchPlan:
        """Steps of one size.

        >>> plan = BatchPlan.even(16, sequence_length=64, num_steps=10)
        >>> plan.first_position(3), plan.tokens_before(3), plan.num_steps
        (48, 3072, 10)
        """
        span = Span(0, 0, 0, num_sequences, sequence_length)
        return cls([span], span.num_tokens * num_steps)

    def num_sequences(self, step: int) -> int:
        """Sequences of a step, over all devices."""
        return self._span(step).num_sequences

    def sequence_length(self, step: int) -> int:
        """Tokens of each sequence of a step."""
        return self._span(step).sequence_length

    def num_tokens(self, step: int) -> int:
        """Tokens of a step, padding included."""
        return self._span(step).num_tokens

    def first_position(self, step: int) -> int:
        """The first position of a step, and how many are read before it."""
        span = self._span(step)
        return span.first_position + (step - span.first_step) * span.num_sequences

    def tokens_before(self, step: int) -> int:
        """Tokens of the steps before a step."""
        span = self._span(step)
        return span.first_tokens + (step - span.first_step) * span.num_tokens

    def step_at(self, position: int) -> int:
        """The step that reads a position."""
        span = self.spans[bisect_right(self._positions, position) - 1]
        return span.first_step + (position - span.first_position) // span.num_sequences

    def step_at_token(self, token: int) -> int:
        """The step that reads a token of the run."""
        span = self.spans[bisect_right(self._tokens, token) - 1]
        return span.first_step + (token - span.first_tokens) // span.num_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of the run."""
        return self.tokens_before(self.num_steps)

    @property
    def num_positions(self) -> int:
        """Positions that the run reads."""
        return self.first_position(self.num_steps)

    def tokens_by_length(self) -> dict[int, int]:
        """Tokens of the run in sequences of each length."""
        found: dict[int, int] = {}
        ends = [*self._steps[1:], self.num_steps]
        for span, end in zip(self.spans, ends, strict=True):
            count = max(0, min(end, self.num_steps) - span.first_step)
            if count:
                found[span.sequence_length] = found.get(span.sequence_length, 0) + count * span.num_tokens
        return found

    def _span(self, step: int) -> Span:
        return self.spans[bisect_right(self._steps, step) - 1]


@dataclass(frozen=True)
class Ramp:
    """How the tokens of a step grow with the tokens read before it: in a straight line, in equal jumps.

    A jump is the greatest common divisor of the first and the last size, so where micro-batches of all devices together
    divide these two, none is ever partly empty; and sizes do not depend on devices.
    Source: GPT-3 (Brown et al. 2020) grows linearly from 32k tokens over the first billions; ModernBERT and Ettin too.
    """

    first: int
    """Tokens of the first step."""
    last: int
    """Tokens of a step from `length` on."""
    length: int
    """Tokens of the run over which it grows; 0: all steps are of the last size."""

    @property
    def jump(self) -> int:
        """Tokens by which a step may be larger than the one before."""
        return gcd(self.first, self.last)

    def size(self, tokens: int) -> int:
        """Tokens of a step that begins after `tokens` tokens: the line's, rounded to whole jumps.

        >>> ramp = Ramp(first=128, last=512, length=3000)
        >>> [ramp.size(tokens) for tokens in (0, 499, 500, 1499, 1500, 2500, 9000)]
        [128, 128, 256, 256, 384, 512, 512]
        """
        if tokens >= self.length:
            return self.last
        count = (self.last - self.first) // self.jump
        return self.first + self.jump * ((2 * count * tokens + self.length) // (2 * self.length))

    def next_change(self, tokens: int) -> int | None:
        """The first token from which steps are larger than those at `tokens`; None: they grow no more."""
        size = self.size(tokens)
        if size == self.last:
            return None
        count, reached = (self.last - self.first) // self.jump, (size - self.first) // self.jump
        return -(-(2 * reached + 1) * self.length // (2 * count))


@lru_cache(maxsize=64)
def plan_batches(tokens: int, ramp: Ramp, lengths: tuple[tuple[int, int], ...]) -> BatchPlan:
    """The steps of a run.

    A step ends where sequences of another length begin, with fewer tokens than it should have where that is in its
    middle; this is so only where `data.skip` moves the beginning.

    Args:
        tokens: the budget.
        lengths: (first position, sequence length), ascending; the first begins at 0. Each length divides the sizes.
            Where a length is that of the one before, nothing changes.
    """
    changes = [0, *(number for number in range(1, len(lengths)) if lengths[number][1] != lengths[number - 1][1])]
    lengths = tuple(lengths[number] for number in changes)
    spans: list[Span] = []
    step = position = before = 0
    for number, (_, length) in enumerate(lengths):
        end = lengths[number + 1][0] if number + 1 < len(lengths) else None
        while end is None or position < end:
            count, change = ramp.size(before) // length, ramp.next_change(before)
            num_steps = None if change is None else -(-(change - before) // (count * length))
            if end is not None:
                count = min(count, end - position)
                whole = (end - position) // count
                num_steps = whole if num_steps is None else min(whole, num_steps)
            spans.append(Span(step, position, before, count, length))
            if num_steps is None:
                break
            step, position = step + num_steps, position + num_steps * count
            before += num_steps * count * length
    return BatchPlan(spans, tokens)


def kept_before(position: int, skip: Sequence[tuple[int, int]]) -> int:
    """How many positions before one are outside the sorted half-open ranges of `skip`.

    >>> kept_before(10, [(2, 4), (8, 20)])
    6
    """
    return position - sum(min(end, position) - start for start, end in skip if start < position)


def stage_starts(sequence_length: int, stages: Iterable[tuple[int, int | None]]) -> tuple[tuple[int, int], ...]:
    """First position and sequence length of the run's beginning and of each stage.

    Args:
        sequence_length: at the beginning.
        stages: (tokens before it, sequence length or None: as before) in order.

    >>> stage_starts(64, [(640, None), (1280, 128), (2560, None)])
    ((0, 64), (10, 64), (20, 128), (30, 128))
    """
    found, before = [(0, sequence_length)], 0
    for from_tokens, length in stages:
        position, previous = found[-1]
        found.append((position + (from_tokens - before) // previous, previous if length is None else length))
        before = from_tokens
    return tuple(found)
