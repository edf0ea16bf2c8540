"""The section `checkpoint`: when to save, and what to keep."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lmssl.recipe.base import Int, Section


class CheckpointSection(Section):
    """When to save and which checkpoints to keep; the last step is always saved."""

    every_steps: Int | None = Field(default=500, ge=1)
    """Null: only at the end."""
    keep_last: Int = Field(default=2, ge=1)
    """The newest so many stay; the two policies below keep others as well."""
    keep_every_steps: Int | None = Field(default=None, ge=1)
    """Checkpoints of multiples of this stay for ever; null: none do."""
    keep_best: Int | None = Field(default=None, ge=1)
    """So many of the lowest validation loss, measured at their own step, stay; null: none do."""
    asynchronous: bool = True
    """Training pauses for a copy in memory, and a thread writes it; false: training waits for the disk."""


def checkpoint_problems(section: CheckpointSection, *, evaluate_every_steps: int | None) -> Iterator[str]:
    """Sentences `path: what; remedy` for what cannot hold beside when the run evaluates."""
    if section.keep_best is None or section.every_steps is None:
        return
    if evaluate_every_steps is None:
        yield (
            "checkpoint.keep_best: no checkpoint but the last has a validation loss, because evaluate.every_steps is "
            f"null; set evaluate.every_steps={section.every_steps}, or leave checkpoint.keep_best out"
        )
    elif section.every_steps % evaluate_every_steps:
        yield (
            f"checkpoint.keep_best: not every checkpoint has a validation loss, because checkpoint.every_steps="
            f"{section.every_steps} is not a multiple of evaluate.every_steps={evaluate_every_steps}; "
            f"set evaluate.every_steps={section.every_steps}"
        )
