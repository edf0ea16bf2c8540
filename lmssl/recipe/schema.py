"""The JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json
from typing import Any

from lmssl.recipe import keys
from lmssl.recipe.meaning import meanings, section_classes
from lmssl.recipe.model import OtherModel
from lmssl.recipe.sections import Recipe

_GROUPED = {"type": "string", "pattern": "^[0-9]{1,3}(_[0-9]{3})+$"}
"""`300_000_000` is a number here and text to editors that follow YAML 1.2 to the letter."""


def recipe_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True, mode="validation")
    families = [
        kind for option in keys.sections(Recipe.model_fields["model"].annotation) for kind in keys.kinds(option)
    ]
    # `oneOf` needs exactly one match, and the class of all other families would match the shipped ones too.
    schema["$defs"][OtherModel.__name__]["properties"]["kind"]["not"] = {"enum": families}
    classes = section_classes()
    for name, definition in [(Recipe.__name__, schema), *schema["$defs"].items()]:
        section = classes[name]
        for field, text in meanings(section).items():
            key = section.model_fields[field].alias or field
            definition["properties"][key].setdefault("description", text)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lmssl recipe"}
    schema.pop("title")
    grouped: dict[str, Any] = _for_editors(schema)
    return head | grouped


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""Pydantic leaves its own names where a number is checked before it is bounded; no editor knows these."""


def schema_text() -> str:
    """The schema as the file `recipes/schema.json` holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _for_editors(value: Any) -> Any:
    if isinstance(value, list):
        return [_for_editors(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") in ("integer", "number"):
        value = {_BOUNDS.get(key, key): part for key, part in value.items()}
    if value.get("type") != "integer":
        return {key: _for_editors(part) for key, part in value.items()}
    about = {key: part for key, part in value.items() if key in ("title", "description", "default")}
    number = {key: part for key, part in value.items() if key not in about}
    return {**about, "anyOf": [number, _GROUPED]}
