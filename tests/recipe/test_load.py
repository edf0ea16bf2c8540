from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lmssl.errors import RecipeError
from lmssl.recipe.load import (
    Loaded,
    Origin,
    _lines,
    difference,
    flat,
    load_recipe,
    order_fields,
    recipe_hash,
    resolved_yaml,
)
from lmssl.recipe.source import read_text

Load = Callable[..., Loaded]


def test_values_numbers_and_lists_mean_what_they_say(load: Load) -> None:
    recipe = load().recipe
    assert (recipe.train.tokens, recipe.schedule.warmup_tokens) == (100_000, 1000)
    assert recipe.steps == 98
    assert recipe.batch_sequences == 16
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.out_path == "runs/tiny"
    assert recipe.data_seed == recipe.seed == 1


def test_every_value_has_its_origin(load: Load) -> None:
    loaded = load("optim.lr=1e-4", "data.validation.ratio=0.1", "data.mixture.1.weight=0.5")
    origins = loaded.origins
    assert origins.keys() == flat(loaded.recipe).keys()
    assert origins["name"] == Origin("file", 1)
    assert origins["data.mixture.1.path"] == Origin("file", 7)
    assert origins["optim.lr"] == Origin("override", "optim.lr=1e-4")
    assert origins["data.mixture.1.weight"].kind == "override"
    assert origins["data.validation.ratio"].kind == "override"
    assert origins["data.validation.tokens"] == Origin("default")
    assert origins["optim.betas"] == Origin("default")
    assert {path for path, origin in origins.items() if origin.kind == "derived"} == {
        "out",
        "data.seed",
        "model.num_key_value_heads",
        "model.head_dim",
        "model.max_position_embeddings",
    }
    assert load("out=here", "model.head_dim=32").origins["model.head_dim"].kind == "override"


def test_the_resolved_recipe_is_complete_stable_and_reads_back(load: Load, tmp_path: Path) -> None:
    recipe = load("track.with=[tensorboard]", "data.cache='~/x: y'", "data.mixture.0.path=['*.txt', 'ü\\t.txt']").recipe
    text = resolved_yaml(recipe)
    path = tmp_path / "resolved.yaml"
    path.write_text(text, encoding="utf-8")
    again = load_recipe(path)
    assert again.recipe == recipe
    assert resolved_yaml(again.recipe) == text
    assert all(origin.kind in ("file", "derived") for origin in again.origins.values())
    assert YAML(typ="safe", pure=True).load(text) == recipe.model_dump(mode="json", by_alias=True)
    assert "eps: 1.0e-08\n" in text
    assert text.index("kind: llama") < text.index("vocab_size")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))), key=st.text("az_ :#é'\"", min_size=1))
def test_any_text_reads_back(text: str, key: str) -> None:
    written = "".join(_lines({key: {"a": [text]}, "b": text}, ""))
    assert read_text(written, "x").data == {key: {"a": [text]}, "b": text}


@pytest.mark.parametrize("word", ["null", "No", "on", "1e-4", "010", "", "~", "- x", "#", "a: b", "'", '"', "\\", "y"])
def test_words_with_a_meaning_are_quoted(load: Load, tmp_path: Path, word: str) -> None:
    recipe = load().recipe.model_copy(update={"out": word})
    path = tmp_path / "word.yaml"
    path.write_text(resolved_yaml(recipe))
    assert load_recipe(path).recipe.out == word


def test_the_hash_is_of_values_alone(load: Load) -> None:
    base = recipe_hash(load().recipe)
    assert len(base) == 64
    assert recipe_hash(load("seed=1", "optim.lr=0.003", "data.validation={}").recipe) == base
    assert recipe_hash(load(replace=[("name: tiny\n", "# a note\n"), ("train:", "name: tiny\ntrain:")]).recipe) == base
    assert recipe_hash(load("seed=2").recipe) != base


def test_differences_are_named_with_old_and_new(load: Load) -> None:
    old = load().recipe
    assert difference(old, load().recipe) == []
    new = load("optim.lr=1e-4", "schedule.kind=cosine", "data.validation=null").recipe
    assert difference(old, new) == [
        ("data.validation.ratio", 0.01, None),
        ("data.validation.tokens", 500_000, None),
        ("data.validation.sets", [], None),
        ("optim.lr", 3e-3, 1e-4),
        ("schedule.kind", "wsd", "cosine"),
        ("schedule.warmup_tokens", 1000, 0),
        ("schedule.decay_ratio", 0.1, None),
        ("schedule.decay", "linear", None),
        ("schedule.min_lr_ratio", 0.0, 0.1),
    ]


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("data.sequence_length=32", True),
        ("data.packing=concat", True),
        ("data.mixture.0.weight=0.6", True),
        ("data.mixture.1.field=text", True),
        ("data.validation.ratio=0.02", True),
        ("data.validation=null", True),
        ("data.seed=2", True),
        ("seed=2", True),
        ("data.window_chunks=2", True),
        ("tokenizer.path=other", True),
        ("data.eos=false", True),
        ("data.temperature=2", True),
        ("data.mixture.0.max_epochs=2", True),
        ("data.stages=[{from_tokens: 2048, weights: {a: 1}}]", True),
        ("data.skip=[[3, 5]]", False),
        ("data.validation.sets=[{name: c, kind: text, path: c}]", False),
        ("data.seed=1", False),
        ("data.validation.tokens=9", False),
        ("data.workers=0", False),
        ("data.cache=elsewhere", False),
        ("data.max_bad_records=1", False),
        ("data.document_attention=false", False),
        ("optim.lr=1", False),
        ("train.tokens=2e5", False),
        ("train.batch_tokens=2048", False),
    ],
)
def test_order_fields_are_those_that_move_tokens(load: Load, override: str, changes: bool) -> None:
    before, after = order_fields(load().recipe), order_fields(load(override).recipe)
    assert (before != after) is changes


def test_loaded_remembers_the_file(load: Load, tmp_path: Path) -> None:
    assert load().path == tmp_path / "tiny.yaml"


def test_errors_of_file_and_values_are_recipe_errors(load: Load, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(raw=b"\xff\xfe")


def test_flat_keeps_plain_lists_whole(load: Load) -> None:
    values: dict[str, Any] = flat(load("track.with=[wandb]").recipe)
    assert values["optim.betas"] == [0.9, 0.95]
    assert values["track.with"] == ["wandb"]
    assert values["data.mixture.0.name"] == "a"
