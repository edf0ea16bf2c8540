"""The section `schedule`: how the learning rate follows the tokens read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lmssl.recipe.base import Float, Int, Section


class WsdSchedule(Section):
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM)."""

    kind: Literal["wsd"]
    warmup_tokens: Int = Field(default=0, ge=0)
    decay_ratio: Float = Field(default=0.2, ge=0, le=1)
    """Share of `train.tokens`, or of `train.max_hours` if these are over first, in the decay."""
    decay: Literal["linear", "1-sqrt", "cosine"] = "linear"
    """Form of the decay; `1-sqrt` falls fast first (Hägele et al. 2024)."""
    min_lr_ratio: Float = Field(default=0.0, ge=0, le=1)
    """Final learning rate / peak."""


class CosineSchedule(Section):
    """Warmup, then half a cosine to `min_lr_ratio`."""

    kind: Literal["cosine"]
    warmup_tokens: Int = Field(default=0, ge=0)
    min_lr_ratio: Float = Field(default=0.1, ge=0, le=1)
    """Final learning rate / peak."""


class LinearSchedule(Section):
    """Warmup, then a straight line to `min_lr_ratio`."""

    kind: Literal["linear"]
    warmup_tokens: Int = Field(default=0, ge=0)
    min_lr_ratio: Float = Field(default=0.0, ge=0, le=1)
    """Final learning rate / peak."""


class InverseSqrtSchedule(Section):
    """Warmup, then the peak times the square root of warmup / tokens read (Vaswani et al. 2017); it has no end."""

    kind: Literal["inverse_sqrt"]
    warmup_tokens: Int = Field(ge=1)
    min_lr_ratio: Float = Field(default=0.0, ge=0, le=1)
    """Learning rate / peak that it does not fall below."""


class ConstantSchedule(Section):
    """Warmup, then the peak for ever; wsd's stable part, to which a decay is added later."""

    kind: Literal["constant"]
    warmup_tokens: Int = Field(default=0, ge=0)


AnySchedule = Annotated[
    WsdSchedule | CosineSchedule | LinearSchedule | InverseSqrtSchedule | ConstantSchedule,
    Field(discriminator="kind"),
]


class BranchSection(Section):
    """Where a run begins that is a branch of another; written by `lmssl train --from-checkpoint RUN@STEP --decay`."""

    run: str
    """Folder of the other run."""
    step: Int = Field(ge=1)
    """Of its checkpoint."""


def schedule_problems(schedule: AnySchedule, *, tokens: int) -> Iterator[str]:
    """Sentences `path: what; remedy` for a schedule that does not fit the run's budget.

    Args:
        tokens: `train.tokens`.
    """
    if schedule.warmup_tokens > tokens:
        yield f"schedule.warmup_tokens: {schedule.warmup_tokens} is more than train.tokens={tokens}; lower it"
    elif isinstance(schedule, WsdSchedule) and schedule.warmup_tokens + schedule.decay_ratio * tokens > tokens:
        yield (
            f"schedule.decay_ratio: the decay's share {schedule.decay_ratio} of train.tokens={tokens} begins before "
            f"the warmup of {schedule.warmup_tokens} tokens ends; lower it or schedule.warmup_tokens"
        )
