from __future__ import annotations

from pydantic.fields import FieldInfo

from lmssl.recipe import keys
from lmssl.recipe.data import JsonlCorpus, TextCorpus
from lmssl.recipe.model import LlamaModel, OtherModel
from lmssl.recipe.optim import AdamW
from lmssl.recipe.schedule import WsdSchedule
from lmssl.recipe.sections import Recipe

DATA = {
    "data": {"mixture": [{"kind": "text"}, {"kind": "jsonl"}, {"kind": "?"}]},
    "model": {"kind": "llama"},
    "optim": {"kind": "adamw"},
    "schedule": {"kind": "wsd"},
}


def test_sections_are_chosen_by_kind() -> None:
    def at(*path: str) -> object:
        return keys.section_at(path, DATA, Recipe)

    assert at() is Recipe
    assert at("optim") is AdamW
    assert at("schedule") is WsdSchedule
    assert at("data", "mixture", "0") is TextCorpus
    assert at("data", "mixture", "1") is JsonlCorpus
    assert at("data", "mixture", "2") is None
    assert at("data", "mixture", "9") is None
    assert at("model") is LlamaModel
    assert keys.section_at(("model",), {"model": {"kind": "mamba"}}, Recipe) is OtherModel
    assert keys.section_at(("model",), {"model": 3}, Recipe) is None
    assert at("nothing") is None
    assert at("optim", "lr") is None


def test_annotations_of_values_and_items() -> None:
    assert keys.annotation_at(("optim", "betas", "2"), DATA, Recipe) is None
    assert keys.options(keys.annotation_at(("optim", "betas", "1"), DATA, Recipe)) == [float]
    assert keys.annotation_at(("optim", "lr", "x"), DATA, Recipe) is None
    field = keys.field_at(("track", "with"), {}, Recipe)
    assert isinstance(field, FieldInfo) and field.alias == "with"
    assert keys.field_at((), {}, Recipe) is None


def test_leaves_follow_the_data_or_cover_every_kind() -> None:
    chosen = {".".join(path) for path in keys.leaves(DATA, Recipe)}
    every = {".".join(path) for path in keys.leaves(None, Recipe)}
    assert "data.mixture.1.field" in chosen and "data.mixture.0.field" not in chosen
    assert "schedule.decay_ratio" in chosen
    assert "model.n_embd" not in chosen and "model.n_embd" in every
    assert {"optim.lr", "data.validation.ratio", "track.with", "data.mixture.0.revision"} <= every
