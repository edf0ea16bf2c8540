"""What each field means, read from the docstring under it, and only when somebody asks.

Pydantic can collect these itself, but does so by parsing the source of every class at every start, a fifth of the
time that `lmssl show` takes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from lmssl.recipe.base import Section


@cache
def meanings(section: type[Section]) -> dict[str, str]:
    """Field name to the docstring under it, inherited fields included."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if issubclass(cls, Section):
            found |= _under_fields(cls)
    return found


@cache
def fill_descriptions() -> None:
    """Give every field of every section its docstring as `description`, for errors to quote."""
    for section in section_classes().values():
        for name, text in meanings(section).items():
            field = section.model_fields[name]
            field.description = field.description or text


def section_classes(base: type[Section] = Section) -> dict[str, type[Section]]:
    """Every section class by its name, which is its name in the schema."""
    found: dict[str, type[Section]] = {}
    for cls in base.__subclasses__():
        found |= {cls.__name__: cls, **section_classes(cls)}
    return found


def _under_fields(cls: type[Section]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found
