"""The section `evaluate`: when a run is measured in training, and what on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from lmssl.recipe.base import AsTuple, Float, Int, Section


class SamplesSection(Section):
    """Texts that the model writes at each evaluation, to look at."""

    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AsTuple] | None = Field(
        default=None, min_length=1
    )
    """What is continued; masked models fill their mask token, T5's its sentinels; null: two held-out documents."""
    max_new_tokens: Int = Field(default=64, ge=1)
    """Longest continuation; of held-out documents that are filled, the tokens that are shown."""
    temperature: Float = Field(default=0.8, ge=0)
    """Logits are divided by it before a token is drawn; 0: the likeliest each time. The default is nanoGPT's."""
    top_p: Float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that have so much probability together."""


class EvaluateSection(Section):
    """When to evaluate on the validation split and on a suite; the start and the end always are."""

    every_steps: Int | None = Field(default=None, ge=1)
    """Null: only before the first and after the last step."""
    suite: str | None = None
    """A file of further evaluations as `lmssl eval --suite` reads it, but for `lm_eval` and `samples`; null: none."""
    samples: SamplesSection | None = None
    """Texts the model writes, by draws that follow `seed` and the step; null: none."""


def evaluate_problems(section: EvaluateSection, *, has_validation: bool) -> Iterator[str]:
    """Sentences `path: what; remedy` for what has nothing to work on."""
    if has_validation:
        return
    if section.samples is not None and section.samples.prompts is None:
        yield (
            "evaluate.samples.prompts: there are no held-out documents to begin with, because data.validation is null; "
            "give prompts, or data.validation"
        )
    if section.every_steps is not None and section.suite is None and section.samples is None:
        yield (
            "evaluate.every_steps: there is nothing to evaluate on, because data.validation is null; "
            "leave evaluate.every_steps out, or give data.validation, evaluate.suite or evaluate.samples"
        )
