"""YAML and overrides to a frozen recipe that knows where each value comes from.

>>> loaded = load_recipe(Path("recipes/debug/gpt-llama.yaml"), ["optim.lr=1e-3"])  # doctest: +SKIP
>>> loaded.recipe.optim.lr, loaded.origins["optim.lr"].kind  # doctest: +SKIP
(0.001, 'override')
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lmssl.recipe.base import Section
from lmssl.recipe.explain import refuse
from lmssl.recipe.override import apply_overrides
from lmssl.recipe.sections import Recipe, derived_fields
from lmssl.recipe.source import Origin, Source, dotted, read_file

__all__ = [
    "Loaded",
    "Origin",
    "difference",
    "flat",
    "load_recipe",
    "load_section",
    "order_fields",
    "recipe_hash",
    "resolved_yaml",
]

T = TypeVar("T", bound=Section)


@dataclass(frozen=True)
class Loaded:
    """A recipe, its file, and the origin of each value by dotted path."""

    recipe: Recipe
    path: Path
    origins: dict[str, Origin]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and check a recipe.

    Raises:
        RecipeError: anything about the file, its keys and values, or an override is wrong.
    """
    recipe, source = _load(Recipe, path, overrides)
    return Loaded(recipe, path, _origins(recipe, source))


def load_section(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read, override and check a file that holds one section by itself, such as a tokenizer's build.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    return _load(kind, path, overrides)[0]


def _load(kind: type[T], path: Path, overrides: Sequence[str]) -> tuple[T, Source]:
    source = read_file(path)
    apply_overrides(source, overrides)
    try:
        return kind.model_validate(source.data), source
    except ValidationError as error:
        refuse(error, source, kind)


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml_text(_plain(recipe))


def yaml_text(values: dict[str, Any]) -> str:
    """Plain values as YAML in the form of recipes, in the order they come in."""
    return "".join(_lines(values, ""))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the recipe's values in hex; comments, order of keys and spelled-out defaults do not change it."""
    text = json.dumps(_plain(recipe), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Changed values as (dotted path, old, new), in recipe order; None where one side has no such key."""
    before, after = flat(old), flat(new)
    paths = [*before, *(path for path in after if path not in before)]
    return [(p, before.get(p), after.get(p)) for p in paths if before.get(p) != after.get(p)]


def order_fields(recipe: Recipe) -> dict[str, Any]:
    """The values that decide which tokens a position holds; a run that continues must find them unchanged."""
    values = {p: v for p, v in flat(recipe).items() if p.startswith(("data.", "tokenizer.path"))}
    free = {p for p in values if any(p == path or p.startswith(path + ".") for path in _ORDER_FREE)}
    return {p: v for p, v in values.items() if p not in free} | {"data.seed": recipe.data_seed}


def flat(recipe: Recipe) -> dict[str, Any]:
    """Values by dotted path; a list of plain values is one value."""
    return dict(_flat(_plain(recipe), ()))


_ORDER_FREE = (
    "data.cache",
    "data.workers",
    "data.skip",
    "data.validation.sets",
    "data.validation.tokens",
    "data.max_bad_records",
    "data.document_attention",
)


def _plain(recipe: Recipe) -> Any:
    return _kind_first(recipe.model_dump(mode="json", by_alias=True))


def _kind_first(value: Any) -> Any:
    # Inherited fields come first in pydantic; people read what a thing is called and what it is before the rest.
    if isinstance(value, dict):
        first = [key for key in ("name", "kind") if key in value]
        return {key: _kind_first(value[key]) for key in (*first, *(key for key in value if key not in first))}
    return [_kind_first(part) for part in value] if isinstance(value, list) else value


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, (*path, key))
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for index, part in enumerate(value):
            yield from _flat(part, (*path, str(index)))
    else:
        yield dotted(path), value


def _origins(recipe: Recipe, source: Source) -> dict[str, Origin]:
    derived = derived_fields(recipe)
    origins: dict[str, Origin] = {}
    for path, value in flat(recipe).items():
        given = source.origins.get(tuple(path.split(".")))
        if value is None and path in derived:
            origins[path] = Origin("derived")
        else:
            origins[path] = given or Origin("default")
    return origins


def _lines(value: Any, indent: str) -> Iterator[str]:
    for key, part in value.items():
        if isinstance(part, dict) and part:
            yield f"{indent}{_scalar(key)}:\n"
            yield from _lines(part, indent + "  ")
        elif isinstance(part, list) and part and all(isinstance(item, dict) and item for item in part):
            yield f"{indent}{_scalar(key)}:\n"
            for item in part:
                first, *rest = _lines(item, indent + "    ")
                yield f"{indent}  - {first.lstrip(' ')}"
                yield from rest
        else:
            yield f"{indent}{_scalar(key)}: {_flow(part)}\n"


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_flow(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(part)}" for key, part in value.items()) + "}"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        text = repr(value)
        # A dot makes `1e-08` a number for YAML 1.1 readers too.
        return text if "." in text else text.replace("e", ".0e")
    return value if _SAFE.fullmatch(value) and value.lower() not in _RESERVED else _quoted(value)


def _quoted(text: str) -> str:
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_SAFE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
