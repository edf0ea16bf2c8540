"""Which keys may stand where: a walk over the section classes along a dotted path."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lmssl.recipe.base import Section
from lmssl.recipe.source import KeyPath


def options(annotation: Any) -> list[Any]:
    """The members of an annotation, with `Annotated` and unions unwrapped."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in options(part)]
    return [annotation]


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields by the name they have in a recipe."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def kinds(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind` a section class stands for; empty for a section without kinds, or of any kind."""
    info = section.model_fields.get("kind")
    return get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()


def sections(annotation: Any) -> list[type[Section]]:
    """The section classes among an annotation's members."""
    return [member for member in options(annotation) if isinstance(member, type) and issubclass(member, Section)]


def section_for(annotation: Any, value: Any) -> type[Section] | None:
    """The section class that reads `value`, chosen by its `kind`."""
    classes = sections(annotation)
    if len(classes) == 1:
        return classes[0]
    kind = value.get("kind", "from" if "from" in value else None) if isinstance(value, dict) else None
    for section in classes:
        if kind in kinds(section):
            return section
    open_classes = [section for section in classes if not kinds(section)]
    return open_classes[0] if open_classes and isinstance(kind, str) else None


def annotation_at(path: KeyPath, data: Any, root: type[Section]) -> Any:
    """The annotation of the value at `path` below `root`, or None where no such key exists."""
    annotation: Any = root
    for key in path:
        inner = _inner(annotation, key, data)
        if inner is None:
            return None
        annotation = inner
        data = _step(data, key)
    return annotation


def section_at(path: KeyPath, data: Any, root: type[Section]) -> type[Section] | None:
    """The section class at `path`."""
    annotation = annotation_at(path, data, root)
    for key in path:
        data = _step(data, key)
    return None if annotation is None else section_for(annotation, data)


def field_at(path: KeyPath, data: Any, root: type[Section]) -> FieldInfo | None:
    """The field at `path`, or None for list items and unknown keys."""
    section = section_at(path[:-1], data, root) if path else None
    return fields(section).get(path[-1]) if section else None


def leaves(data: Any, root: type[Section]) -> Iterator[KeyPath]:
    """Paths of every key below `root` for values like `data`; where no kind is chosen, of every kind."""
    yield from _leaves(root, data, ())


def _leaves(annotation: Any, data: Any, path: KeyPath) -> Iterator[KeyPath]:
    chosen = section_for(annotation, data)
    classes = [chosen] if chosen else sections(annotation)
    for member in options(annotation):
        if get_origin(member) is tuple and sections(get_args(member)[0]):
            items = data if isinstance(data, list) and data else [None]
            for index, item in enumerate(items):
                yield from _leaves(get_args(member)[0], item, (*path, str(index)))
    seen: set[str] = set()
    for section in classes:
        for key, info in fields(section).items():
            if key not in seen:
                seen.add(key)
                yield (*path, key)
                yield from _leaves(info.annotation, _step(data, key), (*path, key))


def _inner(annotation: Any, key: str, data: Any) -> Any:
    section = section_for(annotation, data)
    if section is not None:
        info = fields(section).get(key)
        return info.annotation if info else None
    for member in options(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
        if get_origin(member) is tuple and key.isdecimal():
            parts = get_args(member)
            if len(parts) == 2 and parts[1] is Ellipsis:
                return parts[0]
            return parts[int(key)] if int(key) < len(parts) else None
    return None


def _step(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
        return data[int(key)]
    return None
