"""Recipe text to plain data, with the line of every key.

YAML 1.2 as ruamel.yaml's pure parser splits it; scalars are read here, so that `1e-4` is a number, `no` is text and
`010` is refused instead of guessed. Depth, size and the number of values are bounded, so no file can make this hang.

>>> source = read_text("optim: {lr: 1e-4}", "x.yaml")
>>> source.data, source.origins[("optim", "lr")].mark
({'optim': {'lr': 0.0001}}, 1)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)
from ruamel.yaml.reader import Reader

from lmssl.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a line of the file, the text of an override, a default, or other values."""

    kind: Literal["file", "override", "default", "derived"]
    mark: int | str | None = None
    """Line number for `file`, the override as typed for `override`."""

    def __str__(self) -> str:
        if self.kind == "file":
            return f"line {self.mark}"
        return self.kind


@dataclass
class Source:
    """Plain data and the origin of each of its values, by path."""

    name: str
    data: dict[str, Any]
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    changed_kinds: dict[KeyPath, str] = field(default_factory=dict)
    """Sections whose kind an override changed, so that the file's keys were dropped; with the override."""

    def where(self, path: KeyPath) -> str:
        """The place of the value at `path`, or of the nearest section around it."""
        for end in range(len(path), 0, -1):
            origin = self.origins.get(path[:end])
            if origin is not None:
                return place(self.name, origin)
        return self.name

    def below(self, path: KeyPath) -> list[KeyPath]:
        """The recorded paths of the value at `path` and of everything in it."""
        return [known for known in self.origins if known[: len(path)] == path]

    def forget(self, path: KeyPath) -> None:
        """Drop the origins of the value at `path` and of everything in it."""
        for known in self.below(path):
            del self.origins[known]


def place(name: str, origin: Origin) -> str:
    """A sentence part naming a file's line or an override."""
    if origin.kind == "override":
        return f"override {origin.mark}"
    return f"{name}, line {origin.mark}"


def dotted(path: KeyPath) -> str:
    """The path as people write it: `data.mixture.0.path`."""
    return ".".join(path)


def read_file(path: Path) -> Source:
    """Read a recipe file.

    Raises:
        RecipeError: the file is missing, unreadable, too big, empty, not UTF-8, or not YAML with keys on top.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise RecipeError(
                f"the recipe has {path.stat().st_size} bytes; the limit is {MAX_BYTES}",
                where=str(path),
                remedy="check that the path names a recipe and not data",
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError("there is no such recipe", where=str(path), remedy=_near_files(path)) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe", where=str(path), remedy=_near_files(path / "x")) from None
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}", where=str(path), remedy="check the path and its permissions"
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"the recipe is not UTF-8: byte 0x{raw[error.start]:02x} cannot be read",
            where=f"{path}, line {line}",
            remedy="save the file as UTF-8",
        ) from None
    return read_text(text, str(path))


def _near_files(path: Path) -> str:
    folder = path.parent
    files = sorted(str(found) for found in folder.glob("*.y*ml")) if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), files, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    if files:
        return f"recipes in that folder: {', '.join(files[:8])}"
    return "check the path; recipes/debug/gpt-llama.yaml is a small one to start from"


def read_text(text: str, name: str) -> Source:
    """Read a recipe's text; `name` stands in errors.

    Raises:
        RecipeError: the text is empty, not YAML, or not a mapping of sections.
    """
    source = Source(name, {})
    reader = _Reader(text, lambda line: Origin("file", line), source)
    found, value = reader.document()
    if not found or value is None:
        raise RecipeError(
            "the recipe is empty", where=name, remedy="start from a shipped one, such as recipes/debug/gpt-llama.yaml"
        )
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise RecipeError(
            f"a recipe is a mapping of sections, and this is {kind}",
            where=name,
            remedy="write `key: value` lines; recipes/debug/gpt-llama.yaml is a small recipe to start from",
        )
    source.data = value
    return source


def read_value(text: str, path: KeyPath, origin: Origin, source: Source) -> Any:
    """Read an override's value and record `origin` for `path` and everything below it."""
    reader = _Reader(text, lambda line: origin, source)
    return reader.document(path)[1]


class _CheckedReader(Reader):
    """Ruamel's reader without its regular expression of printable characters, which takes 100 ms to compile."""

    def check_printable(self, data: Any) -> None:
        """Nothing: `_Reader` has looked for characters that may not stand in YAML."""


class _Reader:
    """One pass over the parser's events."""

    def __init__(self, text: str, origin_at: Callable[[int], Origin], source: Source) -> None:
        self.text = text
        self.origin_at = origin_at
        self.source = source
        self.anchors: dict[str, Any] = {}
        self.num_values = 0
        yaml = YAML(typ="safe", pure=True)
        yaml.Reader = _CheckedReader
        self.events: Iterator[Any] = iter(yaml.parse(text))

    def document(self, path: KeyPath = ()) -> tuple[bool, Any]:
        """Whether there is a document, and its value."""
        found, value = False, None
        if strange := _NOT_PRINTABLE.search(self.text):
            raise RecipeError(
                f"the character {strange[0]!r} may not stand in YAML",
                where=self._place(self.text.count("\n", 0, strange.start()) + 1),
                remedy='remove it, or write it in quotes as an escape such as "\\x07"',
            )
        try:
            for event in self.events:
                if isinstance(event, DocumentStartEvent):
                    if found:
                        self._fail("a second document begins", event, "remove the line `---`; a recipe is one document")
                    found = True
                    first = next(self.events)
                    value = self._node(first, path, 0)
                elif isinstance(event, StreamEndEvent):
                    break
        except YAMLError as error:
            self._syntax(error)
        return found, value

    def _node(self, event: Any, path: KeyPath, depth: int) -> Any:
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                self._fail(f"`*{event.anchor}` names an anchor that does not exist", event, _STAR)
            return self._paste(self.anchors[event.anchor], path, line, depth)
        self._count(line, depth)
        if path:
            self.source.origins.setdefault(path, self.origin_at(line))
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        else:
            if event.tag is not None:
                self._fail(f"the tag {event.tag} is not known", event, "remove the tag")
            value = self._mapping(path, depth) if isinstance(event, MappingStartEvent) else self._list(path, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def _mapping(self, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            line = event.start_mark.line + 1
            key = self._scalar(event) if isinstance(event, ScalarEvent) else None
            if key == "<<":
                self._fail("merge keys (`<<`) are not read here", event, "write the keys out")
            if not isinstance(key, str):
                shown = f"`{event.value}`" if isinstance(event, ScalarEvent) else "a mapping or list"
                self._fail(
                    f"{shown} stands where the name of a key should", event, "keys are plain words, such as `lr:`"
                )
            here = (*path, key)
            if key in result:
                both = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}"
                self._fail(f"{dotted(here)} is given twice, on {both}", event, "keep one of them")
            lines[key] = line
            self.source.origins[here] = self.origin_at(line)
            result[key] = self._node(next(self.events), here, depth + 1)
        return result

    def _list(self, path: KeyPath, depth: int) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            result.append(self._node(event, (*path, str(len(result))), depth + 1))
        return result

    def _paste(self, value: Any, path: KeyPath, line: int, depth: int) -> Any:
        self._count(line, depth)
        if path:
            self.source.origins.setdefault(path, self.origin_at(line))
        if isinstance(value, dict):
            return {key: self._paste(part, (*path, key), line, depth + 1) for key, part in value.items()}
        if isinstance(value, list):
            return [self._paste(part, (*path, str(i)), line, depth + 1) for i, part in enumerate(value)]
        return value

    def _count(self, line: int, depth: int) -> None:
        self.num_values += 1
        if depth > MAX_DEPTH or self.num_values > MAX_VALUES:
            what = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise RecipeError(
                f"the recipe has {what}",
                where=self._place(line),
                remedy="a recipe is short; check anchors and brackets",
            )

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.tag is not None and event.tag != "tag:yaml.org,2002:str":
            self._fail(f"the tag {event.tag} is not known", event, "remove the tag; quotes make text")
        if event.tag is not None or not event.implicit[0]:
            return text
        if _LEADING_ZERO.fullmatch(text):
            plain = text.replace("_", "")
            self._fail(
                f"`{text}` is {int(plain)} to some readers and an octal number to others",
                event,
                f"write {int(plain)} for the number, or '{text}' for text",
            )
        try:
            return _plain(text)
        except ValueError:  # Python refuses integers of thousands of digits
            self._fail(f"a number of {len(text)} digits is out of range", event, "write a number that can be meant")

    def _place(self, line: int) -> str:
        return place(self.source.name, self.origin_at(line))

    def _fail(self, what: str, event: Any, remedy: str) -> NoReturn:
        raise RecipeError(what, where=self._place(event.start_mark.line + 1), remedy=remedy)

    def _syntax(self, error: YAMLError) -> NoReturn:
        line, column, problem = 1, 0, str(error).split("\n")[0]
        if isinstance(error, MarkedYAMLError):
            problem = error.problem or error.context or problem
            # What was opened and never closed is found where it began, not where the file ends.
            inside = "flow" in (error.context or "") or "end of stream" in problem
            mark = (error.context_mark if inside else None) or error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column) if mark else (1, 0)
        lines = self.text.splitlines()
        text = lines[line - 1] if line <= len(lines) else ""
        raise RecipeError(
            f"this is not YAML: {problem}", where=self._place(line), remedy=_syntax_remedy(problem, text, column)
        )


_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_STAR = 'put text that begins with `*` or `&` in quotes: "*.txt"'


def _plain(text: str) -> Any:
    """A plain scalar as YAML 1.2's core schema reads it, underscores between digits allowed."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _syntax_remedy(problem: str, text: str, column: int) -> str:
    at = text[column : column + 1]
    if "\t" in text[: column + 1]:
        return "indent with spaces; YAML allows no tabs there"
    if text.count('"') % 2 or text.count("'") % 2:
        return "a quotation mark on this line has no partner"
    for opening, closing in ("[]", "{}"):
        if text.count(opening) != text.count(closing):
            return f"a `{opening}` on this line has no `{closing}`"
    if problem == "mapping values are not allowed here" and not re.search(r":\s+[^'\"{\[]*:\s", text):
        return "a key with indented lines below it has no value on its own line; look at the line above"
    if at in ("@", "`", "%"):
        return f"put text that begins with {at} in quotes"
    if re.search(r"[:\s,\[][*&]", text):
        return _STAR
    if re.search(r":\s+[^'\"{\[]*:\s", text):
        return "put text that holds `: ` in quotes"
    return "compare the indentation with the lines above, and put text with special characters in quotes"
