from __future__ import annotations

from collections.abc import Callable

import pytest

from lmssl.errors import RecipeError
from lmssl.recipe.load import Loaded
from lmssl.recipe.model import Gpt2Model
from lmssl.recipe.schedule import CosineSchedule

Load = Callable[..., Loaded]
Refusal = Callable[..., RecipeError]


def test_values_are_yaml(load: Load) -> None:
    recipe = load(
        "optim.lr=1e-4",
        "data.mixture.1.path=[x.jsonl, 'y.jsonl']",
        "data.validation={ratio: 0.5}",
        "out=runs/a=b",
    ).recipe
    assert recipe.optim.lr == 1e-4
    assert recipe.data.mixture[1].path == ("x.jsonl", "y.jsonl")  # type: ignore[union-attr]
    assert recipe.data.validation is not None and recipe.data.validation.ratio == 0.5
    assert recipe.out == "runs/a=b"
    assert load("optim.betas=[0.8, 0.9]", "optim.betas.1=0.99").recipe.optim.betas == (0.8, 0.99)


def test_sections_the_file_leaves_out_are_begun(load: Load) -> None:
    loaded = load("checkpoint.every_steps=7", "data.validation.tokens=9")
    assert loaded.recipe.checkpoint.every_steps == 7
    assert loaded.origins["checkpoint.every_steps"].kind == "override"
    assert loaded.origins["checkpoint.keep_last"].kind == "default"


def test_the_last_override_of_a_key_wins(load: Load) -> None:
    assert load("optim.lr=1", "optim.lr=2").recipe.optim.lr == 2
    assert load("schedule.kind=cosine", "schedule.kind=wsd").recipe.schedule.warmup_tokens == 1000


def test_a_changed_kind_drops_what_the_file_says_of_the_section(load: Load) -> None:
    schedule = load("schedule.kind=cosine").recipe.schedule
    assert schedule == CosineSchedule(kind="cosine")
    assert load("schedule.kind=wsd").recipe.schedule.warmup_tokens == 1000


@pytest.mark.parametrize("turn", [1, -1])
def test_overrides_of_the_section_survive_wherever_they_stand(load: Load, turn: int) -> None:
    given = ["model.n_embd=32", "model.kind=gpt2", "model.n_layer=1", "model.n_head=2"]
    model = load(*given[::turn]).recipe.model
    assert isinstance(model, Gpt2Model)
    assert (model.n_embd, model.n_layer, model.n_head) == (32, 1, 2)


def test_a_corpus_keeps_name_and_weight(load: Load) -> None:
    corpus = load("data.mixture.1.kind=text", "data.mixture.1.path=b.txt").recipe.data.mixture[1]
    assert (corpus.name, corpus.weight, corpus.kind) == ("b", 0.3, "text")
    assert corpus.path == "b.txt"  # type: ignore[union-attr]


def test_inside_a_changed_kind_only_overridden_parts_of_a_mapping_stay(load: Load) -> None:
    nested = "model: {kind: other, rope_parameters: {a: 1, b: 2}}"
    line = next(line for line in load().path.read_text().split("\n") if line.startswith("model"))
    model = load("model.kind=another", "model.rope_parameters.b=3", replace=[(line, nested)]).recipe.model
    assert model.model_dump()["rope_parameters"] == {"b": 3}


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("optim.lr", "needs a `=`", "write optim.lr=VALUE"),
        ("", "needs a `=`", "optim.lr=3e-4"),
        ("--optim.lr=3", "not with dashes", "write optim.lr=..."),
        ("optim..lr=3", "`optim..lr` has an empty part", "one dot"),
        ("=3", "empty part", "one dot"),
        ("optim.lr=", "has no value", "optim.lr=null"),
        ("optim.lr=[", "not YAML", "has no `]`"),
        ("optim.lr=010", "`010`", "write 10"),
        ("optim.lr.x=2", "optim.lr is a single value (", "give it whole: optim.lr='{x: ...}'"),
        ("checkpoint.every_steps.x=2", "checkpoint.every_steps", ""),
        ("data.mixture.5.path=x", "data.mixture has items 0 to 1, and `5` is none", "data.mixture='[...]'"),
        ("data.mixture.2=x", "items 0 to 1", "whole list"),
        ("data.mixture.x.path=x", "`x` is none of them", "whole list"),
        ("track.with.0=wandb", "track.with is not in the recipe, so it has no item 0", "track.with='[...]'"),
        ("name=\udcff", "not UTF-8", "UTF-8"),
    ],
)
def test_a_wrong_override_is_refused(refusal: Refusal, override: str, what: str, remedy: str) -> None:
    error = refusal(override)
    assert what in error.what
    assert remedy in str(error.remedy)
    assert "override" in str(error.where)


def test_an_empty_list_has_no_items(refusal: Refusal) -> None:
    assert "data.mixture has no items" in refusal("data.mixture=[]", "data.mixture.0.path=x").what


def test_secrets_are_never_shown(refusal: Refusal) -> None:
    for override in ("hub_token=abc123", "track.api_key=abc123", "track.note=hf_abc123abc123"):
        text = str(refusal(override))
        assert "abc123" not in text
        assert "(hidden)" in text
    assert "HF_TOKEN" in str(refusal("hub_token=abc123"))
    assert "abc123" not in str(refusal(replace=[("name: tiny", "name: tiny\nhub_token: abc123")]))
