"""Sections of encoders and of T5's family: defaults, derived sizes and sizes that do not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import TypeAdapter, ValidationError

from kinds import MASKED, SPAN
from lmssl.errors import RecipeError
from lmssl.recipe.encoders import EncoderModel, T5Model, encoder_problems
from lmssl.recipe.load import load_recipe
from lmssl.recipe.model import FAMILIES, ModelSection, null_sizes


def section(kind: str, **change: Any) -> Any:
    return TypeAdapter(ModelSection).validate_python({"kind": kind, **{**MASKED, **SPAN}[kind], **change})


@pytest.mark.parametrize("kind", [*MASKED, *SPAN])
def test_a_kind_is_read_by_its_class_without_dropout(kind: str) -> None:
    model = section(kind)
    assert type(model) is FAMILIES[kind]
    assert list(encoder_problems(model)) == []
    rates = [value for name, value in model.model_dump().items() if "drop" in name]
    assert rates == [0.0] * len(rates)


def test_sizes_have_no_default() -> None:
    with pytest.raises(ValidationError, match="embedding_size"):
        TypeAdapter(ModelSection).validate_python({"kind": "electra", **MASKED["bert"]})


def test_null_sizes_follow_from_the_sequence_and_the_pad_id() -> None:
    assert null_sizes(section("bert"), 128) == {"max_position_embeddings": 128}
    assert null_sizes(section("bert", max_position_embeddings=512), 128) == {}
    assert null_sizes(section("roberta"), 128) == {}
    assert null_sizes(section("roberta"), 128, pad_id=1) == {"max_position_embeddings": 130}
    assert null_sizes(section("eurobert"), 128) == {"max_position_embeddings": 128, "head_dim": 8}
    assert null_sizes(section("umt5"), 128) == {"num_decoder_layers": 2, "d_kv": 8}


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("bert", {"hidden_size": 30}, "model.hidden_size: 30 is not a multiple of model.num_attention_heads=4"),
        ("distilbert", {"dim": 30}, "model.dim: 30 is not a multiple of model.n_heads=4"),
        ("t5", {"d_model": 30}, "model.d_model: 30 is not a multiple of model.num_heads=4; .* or give model.d_kv"),
        ("eurobert", {"hidden_size": 30}, "or give model.head_dim"),
        ("eurobert", {"num_key_value_heads": 3}, "model.num_key_value_heads: 3 does not divide"),
        ("eurobert", {"head_dim": 7}, "heads of 7 numbers cannot be rotated"),
        ("modernbert", {"hidden_size": 36}, "heads of 9 numbers cannot be rotated"),
        ("bert", {"tie_word_embeddings": False}, "model.tie_word_embeddings: bert's class has two biases"),
        ("roberta", {"tie_word_embeddings": False}, "model.tie_word_embeddings: roberta's class has two biases"),
    ],
)
def test_sizes_that_do_not_go_together(kind: str, change: dict[str, Any], sentence: str) -> None:
    problems = list(encoder_problems(cast(EncoderModel | T5Model, section(kind, **change))))
    assert len(problems) == 1
    assert re.search(sentence, problems[0])


def test_a_width_of_heads_of_its_own_frees_the_model_width() -> None:
    assert list(encoder_problems(section("t5", d_model=30, d_kv=8))) == []
    assert list(encoder_problems(section("eurobert", hidden_size=30, head_dim=8))) == []


def test_t5_matrices_are_always_tied() -> None:
    with pytest.raises(ValidationError, match="tie_word_embeddings"):
        section("t5", tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("recipe", "objective", "problem", "remedy"),
    [
        ("masked-bert", "causal", "causal needs a decoder, and bert is none", "use llama, qwen3, gpt2 or objective"),
        ("masked-bert", "replaced", "needs a generator and a discriminator, and bert is none", "use electra or obj"),
        ("masked-bert", "span", "needs an encoder with a decoder, and bert is none", "use t5, umt5, mt5 or obj"),
        ("gpt-llama", "masked", "needs a bidirectional encoder, and llama is none", "or objective.kind: hybrid"),
    ],
)
def test_a_family_for_another_objective_is_refused_with_its_line(
    recipe: str, objective: str, problem: str, remedy: str
) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        load_recipe(Path(f"recipes/debug/{recipe}.yaml"), [f"objective.kind={objective}"])
    assert remedy in str(caught.value.remedy)
    assert "line" in str(caught.value.where) and caught.value.what.startswith("model.kind")
