"""Pydantic's complaints in words: what, where and the remedy for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lmssl.errors import RecipeError
from lmssl.recipe import keys
from lmssl.recipe.base import Section
from lmssl.recipe.hints import foreign, foreign_value, nearest
from lmssl.recipe.meaning import fill_descriptions
from lmssl.recipe.source import KeyPath, Source, dotted
from lmssl.recipe.words import decapitalised, example, expectation, number, one_of, shown, word

MOST_SHOWN = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    path: KeyPath
    what: str
    where: str
    remedy: str
    cures: str | None = None
    """Dotted path of the key that following the remedy would set."""
    missing: bool = False
    owner: str | None = None
    """The kind that has this key, where it is another than the section's."""


def refuse(error: ValidationError, source: Source, root: type[Section]) -> NoReturn:
    """Raise one RecipeError for everything pydantic found.

    Raises:
        RecipeError: always; a single problem keeps its own place and remedy, several are listed.
    """
    fill_descriptions()
    found: dict[KeyPath, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "value_error":
            for sentence in str(detail["ctx"]["error"]).split("\n"):
                # A section's own sentence begins with a field of it, the recipe's with a whole path.
                place = _path(detail["loc"], source.data, "value_error")
                problem = _contradiction(dotted((*place, sentence)), source)
                found.setdefault((*problem.path, sentence), problem)
            continue
        problem = _problem(_path(detail["loc"], source.data, detail["type"]), dict(detail), source, root)
        found.setdefault(problem.path, problem)
    problems = _relevant(list(found.values()))
    order = {path: number for number, path in enumerate(source.origins)}
    problems.sort(key=lambda p: order.get(p.path, len(order)))
    if len(problems) == 1:
        only = problems[0]
        raise RecipeError(only.what, where=only.where, remedy=only.remedy) from None
    lines = [f"{len(problems)} things are wrong in {source.name}"]
    for problem in problems[:MOST_SHOWN]:
        lines += ["", f"- {problem.what}", f"  where:  {problem.where}", f"  remedy: {problem.remedy}"]
    if len(problems) > MOST_SHOWN:
        lines += ["", f"- and {len(problems) - MOST_SHOWN} more"]
    raise RecipeError("\n".join(lines)) from None


def _relevant(problems: list[Problem]) -> list[Problem]:
    """Without what follows from another problem: keys a remedy sets, keys of a wrong kind, lists with a wrong item."""
    cured = {problem.cures for problem in problems}
    wrong_kinds = {problem.path[:-1] for problem in problems if problem.path[-1:] == ("kind",)}
    kept = []
    for problem in problems:
        path, missing = problem.path, problem.missing
        follows = missing and (dotted(path) in cured or (path[-1] != "kind" and path[:-1] in wrong_kinds))
        if not follows and not any(p.path[: len(path)] == path and p.path != path for p in problems):
            kept.append(problem)
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for problem in kept:
        alone = not problem.missing and problem.owner is None
        key = problem.path if alone else (problem.path[:-1], problem.missing, problem.owner)
        groups.setdefault(key, []).append(problem)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: list[Problem]) -> Problem:
    """One problem for several keys that one section lacks, or that all belong to another kind."""
    first = group[0]
    names = one_of([problem.path[-1] for problem in group], "and")
    section = dotted(first.path[:-1])
    if not first.missing:
        remedy = first.remedy.replace("it belongs", "they belong").replace("remove it", "remove them")
        return Problem(first.path, f"{section} has no keys {names}", first.where, remedy)
    what = f"the keys {names} are missing" + (f" from {section}" if section else "")
    remedies = ", ".join(problem.remedy.removeprefix("add ") for problem in group)
    return Problem(first.path, what, first.where, f"add {remedies}")


def _path(location: tuple[int | str, ...], data: Any, kind: str) -> KeyPath:
    """Pydantic's location without the names of union members it puts in between."""
    path: list[str] = []
    for step, part in enumerate(location):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside or (step == len(location) - 1 and kind == "missing"):
            data = data[part] if inside else None
            path.append(str(part))
    return tuple(path)


def _contradiction(sentence: str, source: Source) -> Problem:
    name, _, rest = sentence.partition(": ")
    what, _, remedy = rest.rpartition("; ")
    path = tuple(name.split("."))
    return Problem(path, f"{name}: {what or rest}", source.where(path), remedy or "change one of them")


def _problem(path: KeyPath, detail: dict[str, Any], source: Source, root: type[Section]) -> Problem:
    kind, where = detail["type"], source.where(path)
    if kind == "extra_forbidden":
        return _unknown(path, where, source.data, root)
    if kind == "union_tag_not_found":
        return _missing((*path, "kind"), source, root)
    if kind == "missing" and isinstance(_at(source.data, path[:-1]), dict):
        return _missing(path, source, root)
    if kind == "union_tag_invalid":
        path = (*path, "kind")
        where = source.where(path)
    if kind == "missing" and get_origin(keys.annotation_at(path[:-1], source.data, root)) is tuple:
        path = path[:-1]  # a list of the wrong length
    name, given, annotation = dotted(path), _at(source.data, path), keys.annotation_at(path, source.data, root)
    value = shown(given, name)
    if kind == "union_tag_invalid":
        choices = [
            choice
            for option in keys.sections(keys.annotation_at(path[:-1], source.data, root))
            for choice in keys.kinds(option)
        ]
        remedy = _choice(name, given, choices)
        return Problem(path, f"{name} is {value}; it must be {one_of(choices)}", where, remedy)
    if kind in _BOUNDS:
        context: dict[str, Any] = detail.get("ctx", {})
        limit = context.get("min_length", next(iter(context.values()), ""))
        bound = _BOUNDS[kind].format(f"{limit:g}" if isinstance(limit, float) else limit)
        return Problem(
            path,
            f"{name} is {value}; it must be {bound}",
            where,
            _range_remedy(keys.field_at(path, source.data, root), bound),
        )
    if kind == "string_pattern_mismatch":
        what = f"{name} is {value}; it must be letters, digits, `.`, `_` and `-`, a letter or digit first"
        return Problem(path, what, where, f"write {_cleaned(str(given))}")
    what = f"{name} is {value}; it must be {expectation(annotation)}"
    return Problem(path, what, where, _type_remedy(name, given, annotation))


def _unknown(path: KeyPath, where: str, data: Any, root: type[Section]) -> Problem:
    """A key that its section does not have: a foreign, misplaced or misspelt one, or one of another kind."""

    def problem(remedy: str, cures: str | None = None, owner: str | None = None) -> Problem:
        return Problem(path, f"there is no key {dotted(path)}", where, remedy, cures, owner=owner)

    key, above = path[-1], path[:-1]
    answer = foreign(key)
    if answer is not None and answer.ours and all(dotted(leaf) != answer.ours for leaf in keys.leaves(None, root)):
        answer = None  # the answer is about recipes, and this is another file, such as a task
    if answer is not None and answer.ours != dotted(path):
        return problem(answer.say, answer.ours)
    section = keys.section_at(above, data, root)
    own = list(keys.fields(section)) if section else []
    near = nearest(key, own, 0.75)
    if near is None and (owner := _other_kind(path, data, root)):
        return problem(f"it belongs to kind {owner}; remove it, or change {dotted((*above, 'kind'))}", owner=owner)
    elsewhere = [leaf for tree in (data, None) for leaf in keys.leaves(tree, root) if leaf[-1] == key and leaf != path]
    if near is None and elsewhere:
        return problem(f"it belongs elsewhere: {dotted(elsewhere[0])}", dotted(elsewhere[0]))
    if "." in key:
        return problem(f"dots are for the command line; in a file write {_nested(key)}")
    near = near or nearest(key, own)
    if near is not None:
        return problem(f"did you mean {dotted((*above, near))}?", dotted((*above, near)))
    far = nearest(key, {leaf[-1]: None for leaf in keys.leaves(data, root)}, 0.85)
    if far is not None:
        meant = next(dotted(leaf) for leaf in keys.leaves(data, root) if leaf[-1] == far)
        return problem(f"did you mean {meant}?", meant)
    holder = f"{dotted(above)} has" if above else "the sections are"
    return problem(f"{holder} {', '.join(own)}" if own else "remove it")


_BOUNDS = {
    "greater_than": "more than {}",
    "greater_than_equal": "at least {}",
    "less_than": "less than {}",
    "less_than_equal": "at most {}",
    "too_short": "a list of at least {} item",
    "finite_number": "a finite number",
}


def _missing(path: KeyPath, source: Source, root: type[Section]) -> Problem:
    name, field = dotted(path), keys.field_at(path, source.data, root)
    where, remedy = source.where(path), f"add {path[-1]}: "
    meaning = ""
    if path[-1] == "kind":
        remedy += one_of(_kinds(keys.annotation_at(path[:-1], source.data, root)))
    elif field is not None:
        meaning = f" ({decapitalised(field.description)})" if field.description else ""
        inner = keys.sections(field.annotation)
        remedy += example(inner[0]) if inner else f"<{expectation(field.annotation)}>"
    changed = source.changed_kinds.get(path[:-1])
    if changed is not None:
        where = f"override {changed}, which drops the file's keys of {dotted(path[:-1])}"
    return Problem(path, f"the key {name} is missing{meaning}", where, remedy, missing=True)


def _type_remedy(name: str, value: Any, annotation: Any) -> str:
    choices = [str(c) for option in keys.options(annotation) if get_origin(option) is Literal for c in get_args(option)]
    options = keys.options(annotation)
    nullable = type(None) in options
    if isinstance(value, str) and value.strip().lower() in ("none", "null", "nil") and nullable:
        return "write null, without quotes"
    off = value is False or (isinstance(value, str) and value.lower() in ("off", "no", "false"))
    if off and nullable and not choices and bool not in options:
        return "write null to switch it off"
    if isinstance(value, str) and bool in options and value.lower() in _BOOLEANS:
        return f"YAML 1.2 reads `{value}` as text; write {_BOOLEANS[value.lower()]}"
    if isinstance(value, str) and {int, float} & set(options) and _NUMBER.fullmatch(value.strip()):
        return f"write the number without quotes: {_number_from(value.strip(), float in options)}"
    if choices:
        return _choice(name, value, choices)
    if isinstance(value, float) and int in options:
        return f"write {int(value)} or {int(value) + 1}" if abs(value) < 2**53 else "write a smaller number"
    if str in options and not isinstance(value, dict | list) and value is not None:
        return f'put it in quotes: "{number(value)}"'
    for option in options:
        if get_origin(option) is tuple and not isinstance(value, dict | list):
            parts = [part for part in get_args(option) if part is not Ellipsis]
            inner = keys.sections(parts[0])
            one = example(inner[0]) if inner else word(value)
            return f"write a list: [{', '.join([one, *(f'<{expectation(part)}>' for part in parts[1:])])}]"
    if inner := keys.sections(annotation):
        given = value if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        return f"write {name.rsplit('.', 1)[-1]}: {example(inner[0], given)}"
    return f"write {expectation(annotation)}"


def _range_remedy(field: FieldInfo | None, bound: str) -> str:
    meaning = f" ({decapitalised(field.description)})" if field is not None and field.description else ""
    nullable = field is not None and type(None) in keys.options(field.annotation)
    default = field.default if field is not None and isinstance(field.default, int | float) else None
    left_out = "" if default is None else f", or leave it out: {number(default)}"
    return f"write {'null or ' if nullable else ''}{bound}{meaning}{left_out}"


def _choice(name: str, value: Any, choices: list[str]) -> str:
    known = foreign_value(name, number(value))
    if known:
        return f"write {known}"
    near = nearest(number(value), choices)
    return f"did you mean {near}?" if near else f"choose {one_of(choices)}"


def _other_kind(path: KeyPath, data: Any, root: type[Section]) -> str | None:
    annotation = keys.annotation_at(path[:-1], data, root)
    for option in keys.sections(annotation) if annotation is not None else []:
        if keys.kinds(option) and path[-1] in keys.fields(option):
            return keys.kinds(option)[0]
    return None


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[int(key)] if isinstance(data, list) else data.get(key) if isinstance(data, dict) else None
    return data


def _kinds(annotation: Any) -> list[str]:
    return [kind for section in keys.sections(annotation) for kind in keys.kinds(section)]


def _kind_of(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else value


def _cleaned(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "my-run"


def _nested(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"{first}: {{{_nested(rest) if '.' in rest else rest + ': ...'}}}"


def _number_from(text: str, fraction: bool) -> str:
    # One comma is a decimal comma where fractions make sense, and separates thousands elsewhere.
    return text.replace(",", "." if text.count(",") == 1 and fraction else "")


_BOOLEANS = {
    **dict.fromkeys(("yes", "on", "y", "true"), "true"),
    **dict.fromkeys(("no", "off", "n", "false"), "false"),
}
_NUMBER = re.compile(r"[-+]?[\d_.,]+([eE][-+]?\d+)?")
