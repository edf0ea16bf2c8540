from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from lmssl.errors import RecipeError
from lmssl.recipe.load import Loaded
from lmssl.recipe.sections import Recipe, contradictions, derived_fields

Load = Callable[..., Loaded]
Refusal = Callable[..., RecipeError]
GPT2 = ("model.kind=gpt2", "model.n_embd=64", "model.n_layer=1", "model.n_head=4")


@pytest.mark.parametrize(
    ("overrides", "path", "what"),
    [
        (["train.batch_tokens=1000"], "train.batch_tokens", "not a multiple of data.sequence_length=64"),
        (["train.micro_batch_sequences=17"], "train.micro_batch_sequences", "more than the 16 sequences of a batch"),
        (["data.mixture.0.weight=null"], "data.mixture.0", "a has no weight and others have one"),
        (["data.mixture.1.name=a"], "data.mixture.1.name", "a is also the name of data.mixture.0"),
        (["data.validation=null", "evaluate.every_steps=3"], "evaluate.every_steps", "nothing to evaluate on"),
        (["schedule.warmup_tokens=2e5"], "schedule.warmup_tokens", "more than train.tokens=100000"),
        (["schedule.warmup_tokens=95000"], "schedule.decay_ratio", "before the warmup of 95000 tokens ends"),
        (["model.max_position_embeddings=32"], "model.max_position_embeddings", "32 is less than data.sequence_length"),
        ([*GPT2, "model.n_positions=32"], "model.n_positions", "32 is less than data.sequence_length=64"),
        ([*GPT2, "model.n_head=3"], "model.n_embd", "64 is not a multiple of model.n_head=3"),
        (["model.hidden_size=66"], "model.hidden_size", "not a multiple of model.num_attention_heads=4"),
        (["model.num_key_value_heads=3"], "model.num_key_value_heads", "does not divide"),
        (["model.head_dim=15"], "model.head_dim", "even width, these have 15"),
        (["model.hidden_size=60"], "model.num_attention_heads", "even width, these have 15"),
    ],
)
def test_contradictions_are_refused_where_they_stand(
    refusal: Refusal, overrides: list[str], path: str, what: str
) -> None:
    error = refusal(*overrides)
    assert error.what.startswith(f"{path}: ")
    assert what in error.what
    assert error.remedy and error.remedy not in error.what


def test_several_contradictions_are_all_told(refusal: Refusal) -> None:
    assert "2 things are wrong" in refusal("train.batch_tokens=1000", "model.head_dim=15").what


def test_a_recipe_made_in_python_is_checked_too(load: Load) -> None:
    recipe = load().recipe
    assert contradictions(recipe) == []
    content = recipe.model_dump(by_alias=True)
    content["train"]["batch_tokens"] = 1000
    with pytest.raises(ValidationError, match=r"train\.batch_tokens: 1000 is not a multiple"):
        Recipe.model_validate(content)


def test_recipes_are_frozen(load: Load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().recipe.seed = 3  # type: ignore[misc]


def test_derived_values(load: Load) -> None:
    recipe = load().recipe
    assert derived_fields(recipe) == {
        "model.num_key_value_heads": 4,
        "model.head_dim": 16,
        "model.max_position_embeddings": 64,
        "out": "runs/tiny",
        "data.seed": 1,
    }
    gpt2 = load(*GPT2, "out=x", "data.seed=3").recipe
    assert derived_fields(gpt2) == {"model.n_positions": 64, "model.n_inner": 256}
    other = load("model.kind=olmo2", "out=x", "data.seed=3").recipe
    assert derived_fields(other) == {}


def test_the_budget_is_rounded_up_to_whole_steps(load: Load) -> None:
    assert load("train.tokens=1024", "schedule.warmup_tokens=0").recipe.steps == 1
    assert load("train.tokens=1025", "schedule.warmup_tokens=0").recipe.steps == 2


def test_the_vocabulary_is_rounded_up_unless_the_model_says(load: Load) -> None:
    assert load().recipe.vocab_size(4097) == 4160
    assert load("tokenizer.pad_to_multiple=1").recipe.vocab_size(4097) == 4097
    assert load("model.vocab_size=5000").recipe.vocab_size(4097) == 5000
