"""Every shipped recipe loads, builds and holds what its comments and the table say."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lmssl.recipe.load import load_recipe, recipe_hash, resolved_yaml
from lmssl.recipe.objective import MaskedObjective
from lmssl.recipe.schedule import WsdSchedule
from lmssl.recipe.sections import Recipe
from lmssl.show import built_model, derived_numbers

ROOT = Path(__file__).parents[2]
PRETRAIN = sorted((ROOT / "recipes/pretrain").glob("*.yaml"))
ALL = [*sorted((ROOT / "recipes/debug").glob("*.yaml")), *PRETRAIN, ROOT / "recipes/demo.yaml"]
LADDER = ("10m", "25m", "50m", "125m", "350m", "760m", "1b")
GPT = [path for path in PRETRAIN if path.stem.startswith("gpt-")]
OTHERS = [path for path in PRETRAIN if path not in GPT]
MASKED = [path for path in OTHERS if load_recipe(path).recipe.objective.kind == "masked"]
README = (ROOT / "recipes/README.md").read_text(encoding="utf-8")


def numbers(recipe: Recipe) -> dict[str, Any]:
    return {number.name: number.value for number in derived_numbers(recipe)}


def test_the_ladder_is_complete() -> None:
    assert {path.stem for path in GPT} == {f"gpt-{size}" for size in LADDER}
    assert {path.stem for path in ALL} >= {"gpt-llama", "gpt-qwen3", "gpt-gpt2", "demo"}


def test_every_objective_has_a_recipe_of_its_family() -> None:
    berts = {f"bert-{size}" for size in ("tiny", "mini", "small", "base")}
    moderns = {"modernbert-small", "modernbert-base", "modernbert-base-8k"}
    assert {path.stem for path in MASKED} == berts | moderns | {"cramming"}
    assert {path.stem for path in OTHERS} - {path.stem for path in MASKED} == {
        "electra-small",
        "hybrid-small",
        "t5-mini",
    }
    debug = {load_recipe(path).recipe.objective.kind for path in (ROOT / "recipes/debug").glob("*.yaml")}
    assert debug == {"causal", "masked", "replaced", "span", "prefix", "hybrid"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipes_build_and_the_formula_counts_them(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert built_model(recipe).number.value == numbers(recipe)["parameters"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipes_read_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")
    assert recipe_hash(load_recipe(tmp_path / "resolved.yaml").recipe) == recipe_hash(recipe)


@pytest.mark.parametrize("path", GPT, ids=lambda path: path.stem)
def test_comments_tell_the_truth(path: Path) -> None:
    text, recipe = path.read_text(encoding="utf-8"), load_recipe(path).recipe
    found = numbers(recipe)
    assert f"# {found['parameters']:,} parameters" in text
    assert f"batch_tokens: {recipe.train.batch_tokens} # {recipe.batch_sequences} sequences" in text
    assert recipe.name == path.stem
    nominal = float(path.stem.removeprefix("gpt-")[:-1]) * (1e9 if path.stem.endswith("b") else 1e6)
    assert found["parameters"] == pytest.approx(nominal, rel=0.08)
    assert found["tokens_per_parameter"] == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_comments_of_the_others_tell_the_truth(path: Path) -> None:
    """Size, budget and batch as numbers; a ratio in a comment is that of the recipe."""
    text, recipe = path.read_text(encoding="utf-8"), load_recipe(path).recipe
    train, found = recipe.train, numbers(recipe)
    said = re.search(
        r"^# ([\d,]+) parameters, [\w ]+ included, on ([\d.]+) billion tokens of your own text", text, re.M
    )
    assert said is not None
    assert said[1] == f"{found['parameters']:,}"
    assert float(said[2]) * 1e9 == pytest.approx(train.tokens, rel=0.03)
    assert f"batch_tokens: {train.batch_tokens} # {recipe.batch_sequences} sequences" in text
    assert recipe.name == path.stem
    if ratio := re.search(r"about (\d+) per parameter", text):
        assert found["tokens_per_parameter"] == pytest.approx(float(ratio[1]), rel=0.03)
    if train.batch_warmup is not None:
        first = train.batch_warmup.from_tokens // recipe.data.sequence_length
        assert f"# {first} sequences at first" in text
        assert recipe.batches.num_sequences(0) == first
    if warmup := re.search(r"Warmup over (\d+) % of the budget", text):
        assert recipe.schedule.warmup_tokens == pytest.approx(float(warmup[1]) / 100 * train.tokens, rel=0.03)
    else:
        assert path.stem in ("cramming", "electra-small")


@pytest.mark.parametrize("path", MASKED, ids=lambda path: path.stem)
def test_masked_recipes_see_as_many_targets_as_gpts_see_tokens(path: Path) -> None:
    """About 20 targets per parameter at the rate of the run; a day's budget is what a day holds."""
    recipe = load_recipe(path).recipe
    objective, per_parameter = recipe.objective, numbers(recipe)["tokens_per_parameter"]
    assert isinstance(objective, MaskedObjective)
    rate = objective.rate
    if objective.final_rate is not None:
        rate += objective.decay_ratio / 2 * (objective.final_rate - objective.rate)
    said = re.search(r"# about \d+ per parameter, (\d+) of them targets", path.read_text(encoding="utf-8"))
    if path.stem == "cramming":
        assert said is None and recipe.train.tokens == pytest.approx(24 * 3600 * 81_000, rel=0.01)
    else:
        assert said is not None
        assert rate * per_parameter == pytest.approx(float(said[1]), rel=0.02)
        assert float(said[1]) == pytest.approx(20, rel=0.06)
    assert objective.evaluation_rate == 0.15


def test_the_stage_of_long_sequences_is_the_last_part_of_its_budget() -> None:
    """The comments' shares: 15 % of the tokens in long sequences, and masks that change in the rate's decay."""
    recipe = load_recipe(ROOT / "recipes/pretrain/modernbert-base-8k.yaml").recipe
    (stage,), tokens = recipe.data.stages, recipe.train.tokens
    assert stage.from_tokens == pytest.approx(0.85 * tokens, rel=1e-4)
    objective, schedule, plan = recipe.objective, recipe.schedule, recipe.batches
    assert isinstance(objective, MaskedObjective) and isinstance(schedule, WsdSchedule)
    end = plan.first_position(recipe.steps)
    decay = plan.first_position(plan.step_at_token(round((1 - schedule.decay_ratio) * tokens)))
    assert (end - decay) / end == pytest.approx(objective.decay_ratio, rel=0.02)
    shape = load_recipe(ROOT / "recipes/pretrain/modernbert-base.yaml").recipe.model
    assert recipe.model == shape


@pytest.mark.parametrize("path", GPT, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_widths_are_what_matrix_units_like(path: Path) -> None:
    shape = load_recipe(path).recipe.model.model_dump()
    widths = {name: shape[name] for name in ("hidden_size", "intermediate_size", "d_model", "d_ff") if name in shape}
    assert len(widths) == 2
    assert {name: width % 64 for name, width in widths.items()} == dict.fromkeys(widths, 0)


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


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_second_table_of_the_readme_is_current(path: Path) -> None:
    recipe = load_recipe(path).recipe
    found, shape = numbers(recipe), recipe.model.model_dump()
    layers = shape.get("num_hidden_layers") or "{0} + {0}".format(shape["num_layers"])
    row = (
        f"| [{path.stem}](pretrain/{path.stem}.yaml) | {recipe.objective.kind} | {shape['kind']} "
        f"| {layers} x {shape.get('hidden_size') or shape['d_model']} | {found['parameters']:,} "
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
