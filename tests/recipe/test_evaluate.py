from __future__ import annotations

from collections.abc import Callable

import pytest

from lmssl.errors import RecipeError
from lmssl.recipe.load import Loaded

Load = Callable[..., Loaded]
Refusal = Callable[..., RecipeError]


@pytest.mark.parametrize(
    ("overrides", "path", "what"),
    [
        (
            ["data.validation=null", "evaluate.samples={}"],
            "evaluate.samples.prompts",
            "there are no held-out documents",
        ),
        (["data.validation=null", "evaluate.every_steps=5"], "evaluate.every_steps", "nothing to evaluate on"),
        (["evaluate.samples={prompts: []}"], "evaluate.samples.prompts", "at least 1"),
        (["evaluate.samples={temperature: -1}"], "evaluate.samples.temperature", "it must be at least 0"),
    ],
)
def test_what_has_nothing_to_work_on_is_refused(overrides: list[str], path: str, what: str, refusal: Refusal) -> None:
    error = str(refusal(*overrides))
    assert path in error
    assert what in error


def test_samples_with_prompts_need_no_held_out_text(load: Load) -> None:
    section = load("data.validation=null", "evaluate={every_steps: 5, samples: {prompts: [The]}}").recipe.evaluate
    assert section.samples is not None
    assert section.samples.prompts == ("The",)
