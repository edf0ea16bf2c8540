"""What source may not contain: undocumented public names, unfinished work, swallowed errors."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any

UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public module, classes, functions and methods without a docstring."""
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in _bare_methods(node))


def _bare_methods(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
            inherited = any(
                ast.unparse(decorator) in ("override", "typing.override") for decorator in item.decorator_list
            )
            if ast.get_docstring(item) is None and not inherited:
                yield item.name


def unfinished(text: str) -> Iterator[str]:
    """Notes to oneself, stubs and swallowed errors, each with its line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and UNFINISHED.search(token.string):
            yield f"{token.start[0]}: {token.string}"
        if token.type == tokenize.COMMENT and re.search(r"type:\s*ignore(?!\[)|noqa(?!: [A-Z])", token.string):
            yield f"{token.start[0]}: say which rule is ignored: {token.string}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield f"{node.lineno}: NotImplementedError; use an abstract method, or write it"
        if isinstance(node, ast.ExceptHandler):
            if node.type is None or (ast.unparse(node.type) == "BaseException" and not _raises(node)):
                yield f"{node.lineno}: catches everything, Ctrl-C included"
            if all(isinstance(item, ast.Pass) or _is_dots(item) for item in node.body):
                yield f"{node.lineno}: an error is swallowed; contextlib.suppress says so aloud"


def _raises(node: ast.AST) -> bool:
    return any(isinstance(child, ast.Raise) for child in ast.walk(node))


def _is_dots(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def test_public_names_have_docstrings(sources: list[Any]) -> None:
    assert [f"{source.path}: {name}" for source in sources for name in undocumented(source.tree)] == []


def test_nothing_is_unfinished(sources: list[Any]) -> None:
    assert [f"{source.path}:{line}" for source in sources for line in unfinished(source.text)] == []


def test_the_rules_see_bad_source() -> None:
    bare = 'class A:\n    def f(self): ...\n    def _g(self): ...\ndef h():\n    """Yes."""\n'
    assert list(undocumented(ast.parse(bare))) == ["the module", "A", "A.f"]
    swallowed = "try:\n    f()\nexcept ValueError:\n    pass\n"
    assert len(list(unfinished(swallowed))) == 1
    assert len(list(unfinished("try:\n    f()\nexcept:\n    g()\n"))) == 1
    assert list(unfinished("try:\n    f()\nexcept BaseException:\n    g()\n    raise\n")) == []
    assert len(list(unfinished("x = 1  # TODO: more\nraise NotImplementedError\nf()  # type: ignore\n"))) == 3
