"""Every shipped recipe loads, builds and holds what its comments and the table say."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from lmssl.recipe.load import load_recipe, recipe_hash, resolved_yaml
from lmssl.recipe.sections import Recipe
from lmssl.show import built_number, derived_numbers

ROOT = Path(__file__).parents[2]
PRETRAIN = sorted((ROOT / "recipes/pretrain").glob("*.yaml"))
ALL = [*sorted((ROOT / "recipes/debug").glob("*.yaml")), *PRETRAIN, ROOT / "recipes/demo.yaml"]
LADDER = ("10m", "25m", "50m", "125m", "350m", "760m", "1b")
README = (ROOT / "recipes/README.md").read_text(encoding="utf-8")


def numbers(recipe: Recipe) -> dict[str, Any]:
    return {number.name: number.value for number in derived_numbers(recipe)}


def test_the_ladder_is_complete() -> None:
    assert {path.stem for path in PRETRAIN} == {f"gpt-{size}" for size in LADDER}
    assert {path.stem for path in ALL} >= {"gpt-llama", "gpt-qwen3", "gpt-gpt2", "demo"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipes_build_and_the_formula_counts_them(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert built_number(recipe).value == numbers(recipe)["parameters"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipes_read_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")
    assert recipe_hash(load_recipe(tmp_path / "resolved.yaml").recipe) == recipe_hash(recipe)


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_comments_tell_the_truth(path: Path) -> None:
    text, recipe = path.read_text(encoding="utf-8"), load_recipe(path).recipe
    found = numbers(recipe)
    assert f"# {found['parameters']:,} parameters" in text
    assert f"batch_tokens: {recipe.train.batch_tokens} # {recipe.batch_sequences} sequences" in text
    assert recipe.name == path.stem
    nominal = float(path.stem.removeprefix("gpt-")[:-1]) * (1e9 if path.stem.endswith("b") else 1e6)
    assert found["parameters"] == pytest.approx(nominal, rel=0.08)
    assert found["tokens_per_parameter"] == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_choices_follow_their_sources(path: Path) -> None:
    recipe = load_recipe(path).recipe
    flops = numbers(recipe)["total_flops"]
    assert recipe.optim.lr == pytest.approx(0.3118 * flops**-0.125, rel=0.05)
    assert recipe.train.batch_tokens == pytest.approx(0.292 * flops**0.3271, rel=0.15)
    assert recipe.batch_sequences % 32 == 0
    assert recipe.schedule.warmup_tokens == pytest.approx(0.02 * recipe.train.tokens, rel=0.03)
    multiple = 64 if numbers(recipe)["parameters"] < 2e8 else 128
    shape = recipe.model.model_dump()
    assert shape["hidden_size"] % multiple == shape["intermediate_size"] % multiple == 0
    heads = shape["head_dim"] or shape["hidden_size"] / shape["num_attention_heads"]
    assert heads in (64, 128)


def test_the_ladder_climbs() -> None:
    recipes = [load_recipe(ROOT / f"recipes/pretrain/gpt-{size}.yaml").recipe for size in LADDER]
    rates = [recipe.optim.lr for recipe in recipes]
    batches = [recipe.train.batch_tokens for recipe in recipes]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    assert batches == sorted(batches) and len(set(batches)) == len(batches)


@pytest.mark.parametrize("size", LADDER)
def test_the_table_of_the_readme_is_current(size: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/pretrain/gpt-{size}.yaml").recipe
    found, shape = numbers(recipe), recipe.model.model_dump()
    row = (
        f"| [gpt-{size}](pretrain/gpt-{size}.yaml) | {shape['kind']} "
        f"| {shape['num_hidden_layers']} x {shape['hidden_size']} | {found['parameters']:,} "
        f"| {recipe.train.tokens / 1e9:.3g} B | {recipe.train.batch_tokens:,} | {found['steps']:,} "
        f"| {recipe.optim.lr:g} | {found['total_flops']:.1e} |"
    )
    assert row in README.split("\n")


def test_debug_recipes_are_small_and_accumulate() -> None:
    for path in (ROOT / "recipes/debug").glob("*.yaml"):
        recipe = load_recipe(path).recipe
        found = numbers(recipe)
        assert found["parameters"] < 2e6 and found["total_flops"] < 1e13
        assert found["accumulation"] == 2
        assert [corpus.kind for corpus in recipe.data.mixture] == ["python_docs"]


def test_editors_find_the_schema() -> None:
    for path in ALL:
        first = path.read_text(encoding="utf-8").split("\n")[0]
        if found := re.fullmatch(r"# yaml-language-server: \$schema=(.+)", first):
            assert (path.parent / found[1]).is_file()
        else:
            assert path.stem == "demo"


def test_show_and_train_commands_of_the_readme_are_valid() -> None:
    commands = [shlex.split(line, comments=True) for line in README.split("\n") if " lmssl " in f" {line} "]
    recipes = [words[words.index("lmssl") + 2 :] for words in commands if {"show", "train"} & set(words)]
    recipes = [words for words in recipes if words and words[0].startswith("recipes/")]
    assert len(recipes) >= 7
    for path, *overrides in recipes:
        load_recipe(ROOT / path, overrides)
    changes = re.search(r"`(train\.tokens=\S+ schedule\.\S+)`", README)
    assert changes is not None
    longer = load_recipe(ROOT / "recipes/pretrain/gpt-125m.yaml", changes[1].split()).recipe
    assert math.isclose(longer.train.tokens, 1e10)


@pytest.mark.parametrize("name", ["single", "ddp"])
def test_launch_files_are_accelerates_and_leave_precision_to_recipes(name: str) -> None:
    config: Any = load_config_from_file(str(ROOT / f"recipes/launch/{name}.yaml"))
    assert config.mixed_precision == "no"
    assert config.num_machines == 1
    expected = {"single": ("NO", 1), "ddp": ("MULTI_GPU", -1)}[name]
    assert (config.distributed_type.value, config.num_processes) == expected
