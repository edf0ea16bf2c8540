from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lmssl.recipe.schema import recipe_schema, schema_text
from lmssl.recipe.source import read_file, read_text

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_shipped_schema_is_current(root: Path) -> None:
    path = root / "recipes/schema.json"
    assert path.read_text(encoding="utf-8") == schema_text(), "run `lmssl schema --out recipes/schema.json`"


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name != "launch"], ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(validator: jsonschema.Draft202012Validator, path: Path) -> None:
    assert [error.message for error in validator.iter_errors(read_file(path).data)] == []


@pytest.mark.parametrize(
    "change",
    [
        ("lr: 3e-3", "lrr: 3e-3"),
        ("lr: 3e-3", "lr: abc"),
        ("tokens: 1e5", "tokens: 1.5"),
        ("tokens: 1e5", "tokens: 0"),
        ("kind: wsd", "kind: wds"),
        ("hidden_size: 64", "hiden_size: 64"),
        ("kind: text, path", "kind: text, paths"),
        ("name: tiny", "name: a b"),
    ],
)
def test_mistakes_are_not(validator: jsonschema.Draft202012Validator, text: str, change: tuple[str, str]) -> None:
    assert validator.is_valid(read_text(text, "x").data)
    assert change[0] in text
    assert not validator.is_valid(read_text(text.replace(*change), "x").data)


def test_numbers_in_every_notation_are_valid(validator: jsonschema.Draft202012Validator, text: str) -> None:
    def with_tokens(value: Any) -> Any:
        content = read_text(text, "x").data
        content["train"]["tokens"] = value
        return content

    assert validator.is_valid(with_tokens(3e8))
    # Editors that follow YAML 1.2 to the letter see text where underscores group digits.
    assert validator.is_valid(with_tokens("300_000_000"))
    assert not validator.is_valid(with_tokens("300000000"))
    assert not validator.is_valid(with_tokens("3e8"))


def test_other_families_and_aliases(validator: jsonschema.Draft202012Validator, text: str) -> None:
    content = read_text(text, "x").data
    content["model"] = {"kind": "olmo2", "hidden_size": 64, "anything": 1}
    content["track"] = {"with": ["wandb"]}
    assert validator.is_valid(content)
    content["track"] = {"trackers": ["wandb"]}
    assert not validator.is_valid(content)


def test_fields_are_described() -> None:
    definitions = json.loads(schema_text())["$defs"]
    assert definitions["AdamW"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert "padding included" in definitions["TrainSection"]["properties"]["tokens"]["description"]
    assert json.loads(schema_text())["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_schema_and_loader_agree_on_what_is_required(
    validator: jsonschema.Draft202012Validator, load: Callable[..., Any]
) -> None:
    content = load().recipe.model_dump(mode="json", by_alias=True)
    assert validator.is_valid(content)
    for section in recipe_schema()["required"]:
        assert not validator.is_valid({key: value for key, value in content.items() if key != section})


def test_bounds_have_the_names_that_editors_know() -> None:
    text = schema_text()
    assert '"minimum"' in text and '"exclusiveMinimum"' in text
    assert not any(f'"{name}"' in text for name in ("ge", "gt", "le", "lt", "multiple_of"))
