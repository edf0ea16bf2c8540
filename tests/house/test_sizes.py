"""Files up to 400 lines, functions up to 60, and names that say what a file owns."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# "path" or "path:function" -> why it may be longer.
LONGER: dict[str, str] = {}
BANNED_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py", "core.py", "base_utils.py"}


def long_functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and length of each function over the limit, decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def _python(root: Path) -> list[Path]:
    return sorted(path for folder in ("lmssl", "tests", "benchmarks") for path in (root / folder).rglob("*.py"))


def test_sizes(root: Path) -> None:
    wrong, used = [], set()
    for path in _python(root):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        sizes = [
            (f"{name}:{function}", lines, MAX_FUNCTION_LINES) for function, lines in long_functions(ast.parse(text))
        ]
        sizes.append((name, text.count("\n"), MAX_FILE_LINES))
        for what, lines, limit in sizes:
            if lines > limit and what in LONGER:
                used.add(what)
            elif lines > limit:
                wrong.append(f"{what} has {lines} lines, {limit} are allowed")
    assert wrong == []
    assert used == set(LONGER), "exceptions nobody needs any more"


def test_no_catch_all_files(root: Path) -> None:
    assert [path for path in _python(root) if path.name in BANNED_NAMES] == []


def test_a_long_function_is_seen() -> None:
    body = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert list(long_functions(ast.parse(body))) == [("f", MAX_FUNCTION_LINES + 1)]
    assert list(long_functions(ast.parse(body.replace("    x = 1\n", "", 1)))) == []
