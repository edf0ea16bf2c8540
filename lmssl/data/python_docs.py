"""The text every CPython ships: language reference topics and the docstrings of the standard library.

Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator

from lmssl.data.records import BadRecord, Item, checked
from lmssl.errors import DataError

TEXT_SHARE = 8
"""About one byte in eight of the standard library's source is docstring."""

_MIN_CHARS = 80
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Where statements hold statements; expressions, most of a tree, are never visited."""
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.ExceptHandler)
_TOPICS = os.path.join("pydoc_data", "topics.py")


def library_folder() -> str:
    """The standard library of the running interpreter."""
    return sysconfig.get_paths()["stdlib"]


def list_files() -> list[str]:
    """The language reference and every module of the standard library, in a stable order.

    Raises:
        DataError: this Python comes without its sources.
    """
    root = library_folder()
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [os.path.join(folder, name) for name in files if name.endswith(".py")]
    if not found:
        raise DataError(
            "this Python has no standard library sources",
            where=root,
            remedy="use an interpreter installed with its .py files",
        )
    return sorted(found)


def num_text_bytes(path: str) -> int:
    """Estimated bytes of text in a file that `list_files` found."""
    size = os.path.getsize(path)
    return size if path.endswith(_TOPICS) else size // TEXT_SHARE


def read_docs(path: str) -> Iterator[Item]:
    """Topics or docstrings of one file; `start` is a line number."""
    with open(path, "rb") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        yield BadRecord(0, 0, f"not Python: {error}")
        return
    found = _topics(tree) if path.endswith(_TOPICS) else _docstrings(tree, _module_name(path))
    for number, (line, text) in enumerate(found):
        yield checked(text, "text", number, line, ("text",))


def _topics(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if key is not None:
                    yield key.lineno, ast.literal_eval(value)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text is not None and len(text) >= _MIN_CHARS:
            yield getattr(node, "lineno", 1), f"{name}\n\n{text}\n"
    for block in _BLOCKS:
        for child in getattr(node, block, ()):
            child_name = getattr(child, "name", None) if isinstance(child, _NAMED) else None
            inner = f"{name}.{child_name}" if child_name is not None else name
            yield from _docstrings(child, inner)


def _module_name(path: str) -> str:
    parts = os.path.relpath(path, library_folder()).removesuffix(".py").split(os.sep)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
