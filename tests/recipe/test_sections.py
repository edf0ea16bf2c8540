from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from lmssl.errors import RecipeError
from lmssl.recipe.load import Loaded, load_recipe, resolved_yaml
from lmssl.recipe.sections import Recipe, contradictions, derived_fields

Load = Callable[..., Loaded]
Refusal = Callable[..., RecipeError]
SPAN = "model={kind: t5, d_model: 32, d_ff: 48, num_layers: 2, num_heads: 2}"
GPT2 = ("model.kind=gpt2", "model.n_embd=64", "model.n_layer=1", "model.n_head=4")


def stages(*written: str) -> str:
    """An override with stages `from_tokens, weights`."""
    parts = (text.split(", ", 1) for text in written)
    return (
        "data.stages=[" + ", ".join(f"{{from_tokens: {start}, weights: {weights}}}" for start, weights in parts) + "]"
    )


def validation_set(keys: str) -> str:
    return f"data.validation.sets=[{{kind: text, path: x.txt, {keys}}}]"


@pytest.mark.parametrize(
    ("overrides", "path", "what"),
    [
        (["train.batch_tokens=1000"], "train.batch_tokens", "not a multiple of data.sequence_length=64"),
        (["train.micro_batch_sequences=17"], "train.micro_batch_sequences", "more than the 16 sequences of a batch"),
        (["data.mixture.0.weight=null"], "data.mixture.0", "a has no weight and others have one"),
        (["data.mixture.1.name=a"], "data.mixture.1.name", "a is also the name of data.mixture.0"),
        (["data.mixture.0.weight=0"], "data.mixture.0.weight", "a has weight 0 and no stage gives it more"),
        (
            ["data.mixture.0.weight=0", "data.mixture.1.weight=0", stages("2048, {a: 1, b: 1}")],
            *("data.mixture", "every weight is 0"),
        ),
        ([stages("1000, {a: 1}")], "data.stages.0.from_tokens", "not a multiple of train.batch_tokens=1024"),
        ([stages("1e5, {a: 1}")], "data.stages.0.from_tokens", "100000 is not a multiple"),
        ([stages("102400, {a: 1}")], "data.stages.0.from_tokens", "not before the end, train.tokens=100000"),
        ([stages("2048, {a: 1}", "2048, {b: 1}")], "data.stages.1.from_tokens", "not after 2048"),
        ([stages("2048, {a: 1, c: 1}")], "data.stages.0.weights", "no corpus c in data.mixture"),
        ([stages("2048, {a: 0}")], "data.stages.0.weights", "no corpus has a weight above 0"),
        (["data.skip=[[5, 5]]"], "data.skip.0", "[5, 5] holds no positions"),
        (["data.cls=true"], "data.cls", "and that of data.eos around each document"),
        (["data.sep=true", "data.eos=false", "data.bos=true"], "data.sep", "and that of data.bos around each document"),
        (
            ["data.cls=true", "data.sep=true", "data.eos=false", "data.fill_in_the_middle={}"],
            *("data.fill_in_the_middle", "data.cls belongs to other objectives"),
        ),
        (
            ["objective={kind: prefix}", "data.document_attention=false"],
            *("data.document_attention", "the objective prefix keeps every document to itself"),
        ),
        (
            [SPAN, "objective={kind: span}", "data.eos=true"],
            "data.eos",
            "span puts sentinels and eos into its examples",
        ),
        (
            ["objective={kind: prefix}", "data.fill_in_the_middle={}"],
            *("data.fill_in_the_middle", "the objective is prefix"),
        ),
        (["data.skip=[[-1, 5]]"], "data.skip.0", "[-1, 5] holds no positions"),
        (["data.skip=[[3, 9], [8, 12]]"], "data.skip.1", "[8, 12] begins before 9"),
        (["data.skip=[[8, 12], [1, 3]]"], "data.skip.1", "[1, 3] begins before 12"),
        ([validation_set("name: a")], "data.validation.sets.0.name", "a is also the name of data.mixture.0"),
        ([validation_set("name: c, weight: 1")], "data.validation.sets.0.weight", "not trained on"),
        ([validation_set("name: c, max_epochs: 1")], "data.validation.sets.0.max_epochs", "not trained on"),
        (["data.validation=null", "evaluate.every_steps=3"], "evaluate.every_steps", "nothing to evaluate on"),
        (["checkpoint.keep_best=1"], "checkpoint.keep_best", "no checkpoint but the last has a validation loss"),
        (["checkpoint.keep_best=1", "evaluate.every_steps=300"], "checkpoint.keep_best", "not every checkpoint has"),
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


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("data.skip=[[1, 2, 3]]", "data.skip.0", "list of 2 whole numbers"),
        ("data.skip=[5]", "data.skip.0 is 5", "write a list: [5, <a whole number>]"),
        ("data.skip=[[1, x]]", 'data.skip.0.1 is "x"', "whole number"),
        (stages("2048, {a: -1}"), "data.stages.0.weights.a is -1", "at least 0"),
        (stages("2048, {a: x}"), 'data.stages.0.weights.a is "x"', "a number"),
        (stages("2048, [1, 2]"), "data.stages.0.weights is the list", "a mapping"),
        (stages("0, {a: 1}"), "data.stages.0.from_tokens is 0", "at least 1"),
        ("data.temperature=0", "data.temperature is 0", "more than 0"),
        ("data.mixture.0.max_epochs=0", "data.mixture.0.max_epochs is 0", "more than 0"),
    ],
)
def test_bad_values_of_the_order_are_explained(refusal: Refusal, override: str, what: str, remedy: str) -> None:
    error = refusal(override)
    assert what in error.what
    assert remedy in f"{error.what}\n{error.remedy}"


def test_ranges_and_stages_survive_the_resolved_yaml(load: Load, tmp_path: Path) -> None:
    recipe = load("data.skip=[[3, 9], [9, 12]]", stages("2048, {a: 1}", "4096, {b: 2, a: 0.5}")).recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(recipe), encoding="utf-8")
    again = load_recipe(path).recipe
    assert again == recipe and again.data.skip == ((3, 9), (9, 12))
    assert [stage.weights for stage in again.data.stages] == [{"a": 1.0}, {"b": 2.0, "a": 0.5}]


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
