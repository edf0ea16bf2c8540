"""Overrides from the command line: `optim.lr=3e-4`, `data.mixture.0.path="x/*.txt"`; values are YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lmssl.errors import RecipeError
from lmssl.recipe.hints import is_secret
from lmssl.recipe.source import KeyPath, Origin, Source, dotted, place, read_value

CORPUS_KEEPS = ("name", "weight")
"""Keys of a corpus that survive a change of its `kind`."""


@dataclass(frozen=True)
class _Override:
    text: str
    """As typed; a secret value is hidden."""
    path: KeyPath
    value: str


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Change `source` in place; the last of two overrides of one key wins.

    A changed `kind` drops what the file says about its section, because another kind's `lr` is another number.

    Raises:
        RecipeError: an override has no `=`, no value, or a path that leads nowhere.
    """
    parsed: dict[KeyPath, _Override] = {}
    for text in overrides:
        override = _parse(text)
        parsed.pop(override.path, None)
        parsed[override.path] = override
    for override in parsed.values():
        _apply(source, override)


def _parse(text: str) -> _Override:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if is_secret(path[-1]) or re.search(r"hf_[A-Za-z0-9]{8}", value):
        text = f"{key}=(hidden)"
    if not equals:
        _fail("an override needs a `=`", text, f"write {key.lstrip('-') or 'optim.lr'}=VALUE, such as optim.lr=3e-4")
    if key.startswith("-"):
        _fail("an override begins with its key, not with dashes", text, f"write {key.lstrip('-')}=...")
    if not all(path):
        _fail(f"`{key}` has an empty part", text, "write sections and keys with one dot between: optim.lr=3e-4")
    if not value.strip():
        _fail(f"the override of {key} has no value", text, f"write {key}=null to switch it off, or leave it out")
    try:
        (key + value).encode()
    except UnicodeEncodeError:
        _fail("an override is not UTF-8", ascii(text), "write it in UTF-8")
    return _Override(text, path, value)


def _apply(source: Source, override: _Override) -> None:
    parent = _parent(source, override)
    path, key = override.path, override.path[-1]
    origin = Origin("override", override.text)
    source.forget(path)
    value = read_value(override.value, path, origin, source)
    if isinstance(parent, list):
        parent[int(key)] = value
        return
    if key == "kind" and len(path) > 1 and "kind" in parent and parent["kind"] != value:
        keeps = CORPUS_KEEPS if path[-3:-2] == ("mixture",) else ()
        _keep_overrides(source, parent, path[:-1], keeps)
        source.changed_kinds[path[:-1]] = override.text
    parent[key] = value


def _parent(source: Source, override: _Override) -> dict[str, Any] | list[Any]:
    """The mapping or list that holds the override's last key; sections the file leaves out are begun."""
    here: Any = source.data
    path = override.path
    for depth, key in enumerate(path):
        so_far = path[:depth]
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                items = f"items 0 to {len(here) - 1}" if here else "no items"
                _fail(
                    f"{dotted(so_far)} has {items}, and `{key}` is none of them",
                    override.text,
                    f"name one that exists, or give the whole list: {dotted(so_far)}='[...]'",
                )
        elif not isinstance(here, dict):
            origin = source.origins.get(so_far)
            at = f" ({place(source.name, origin)})" if origin else ""
            _fail(
                f"{dotted(so_far)} is a single value{at}; it has no key `{key}`",
                override.text,
                f"give it whole: {dotted(so_far)}='{{{key}: ...}}'",
            )
        if depth == len(path) - 1:
            break
        if isinstance(here, list):
            here = here[int(key)]
            continue
        if key not in here:
            if path[depth + 1].isdecimal():
                whole = dotted(path[: depth + 1])
                _fail(
                    f"{whole} is not in the recipe, so it has no item {path[depth + 1]}",
                    override.text,
                    f"give the list whole: {whole}='[...]'",
                )
            here[key] = {}
            source.origins[path[: depth + 1]] = Origin("override", override.text)
        here = here[key]
    assert isinstance(here, dict | list)
    return here


def _keep_overrides(source: Source, section: dict[str, Any], path: KeyPath, keeps: tuple[str, ...]) -> None:
    """Drop what does not come from an override."""
    for key in list(section):
        here = (*path, key)
        kinds = [source.origins[known].kind == "override" for known in source.below(here)]
        if key in keeps or all(kinds):
            continue
        if isinstance(section[key], dict) and any(kinds):
            _keep_overrides(source, section[key], here, ())
            continue
        del section[key]
        source.forget(here)


def _fail(what: str, text: str, remedy: str) -> NoReturn:
    raise RecipeError(what, where=f"override {text}", remedy=remedy)
