"""Values, types and lists in words, as errors put them."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

from lmssl.recipe import keys
from lmssl.recipe.base import Section
from lmssl.recipe.hints import is_secret


def expectation(annotation: Any) -> str:
    """What a value must be, in words."""
    parts: list[str] = []
    for option in keys.options(annotation):
        if get_origin(option) is Literal:
            parts += [word(choice) for choice in get_args(option)]
        elif option is type(None):
            parts.append("null")
        elif get_origin(option) is tuple:
            inner = get_args(option)
            count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            parts.append(f"a list of {count}{_plural(inner[0])}")
        elif option in _SINGULAR:
            parts.append(_SINGULAR[option])
        else:
            parts.append("a mapping of keys")
    return one_of(list(dict.fromkeys(parts)))


def shown(value: Any, name: str = "") -> str:
    """A value as an error may show it: short, and never a secret."""
    if is_secret(name.rsplit(".", 1)[-1]) or (isinstance(value, str) and re.match(r"hf_[A-Za-z0-9]{8}", value)):
        return "(hidden)"
    if isinstance(value, str):
        return _cut(json.dumps(value, ensure_ascii=False))
    if isinstance(value, dict):
        return "a mapping of keys" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"the list {_cut(json.dumps(list(value), ensure_ascii=False, default=str))}"
    return number(value)


def number(value: Any) -> str:
    """A scalar as YAML writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def word(value: Any) -> str:
    """A scalar as a recipe holds it, text without quotes."""
    return value if isinstance(value, str) else number(value)


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def decapitalised(text: str | None) -> str:
    """The first line of a description as a part of a sentence."""
    line = (text or "").split("\n")[0].rstrip(".")
    return line if line[1:2].isupper() else line[:1].lower() + line[1:]


def example(section: type[Section], value: Any = None) -> str:
    """The section's required keys as a flow mapping, `value` in the first that can hold it."""
    parts = []
    for key, info in keys.fields(section).items():
        kinds = keys.kinds(section) if key == "kind" else ()
        required = info.is_required()
        if kinds:
            parts.append(f"kind: {value if isinstance(value, str) else kinds[0]}")
            value = None if isinstance(value, str) else value
        elif required or (value is not None and not parts):
            parts.append(f"{key}: {word(value) if value is not None else '...'}")
            value = None
    return "{" + ", ".join(parts) + "}"


def one_of(choices: list[str], joint: str = "or") -> str:
    """`a, b or c`."""
    return choices[0] if len(choices) == 1 else ", ".join(choices[:-1]) + f" {joint} " + choices[-1]


def _plural(annotation: Any) -> str:
    option = keys.options(annotation)[0]
    if get_origin(option) is Literal:
        return one_of([str(choice) for choice in get_args(option)])
    return _PLURAL.get(option, "mappings")


_SINGULAR: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}
