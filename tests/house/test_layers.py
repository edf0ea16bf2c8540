"""Imports point down, and what answers at once imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAVY = {"torch", "transformers", "accelerate", "datasets"}
LIGHT = (
    "cli",
    "verbs",
    "errors",
    "recipe",
    "release",
    "shipped",
    "show",
    "tokenizer",
    "model.flops",
    "model.roles",
    "model.source",
    "data",
)
NOT_LIGHT = {"lmssl.data.batch": "torch's DataLoader lives there"}
# Distributions whose module has another name.
OTHER_NAMES = {"scikit_learn": "sklearn"}
# Siblings do not know each other, except:
SIBLINGS: dict[tuple[str, str], str] = {}


def imports(tree: ast.AST, known: set[str], *, inside_functions: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module; `if TYPE_CHECKING` does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), known, inside_functions=inside_functions)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in known else node.module
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, known, inside_functions=inside_functions)


def upward(module: str, tree: ast.Module, known: set[str], layers: list[list[str]]) -> list[str]:
    """The imports of one module that do not point down."""
    depth = {room: level for level, rooms in enumerate(layers) for room in rooms} | {"__main__": -1}
    room, wrong = _room(module), []
    for line, name in imports(tree, known):
        other = _room(name)
        if not name.startswith("lmssl.") or other == room or (room, other) in SIBLINGS:
            continue
        if depth[other] <= depth[room]:
            relation = "a sibling" if depth[other] == depth[room] else "above it"
            wrong.append(f"{module}:{line}: imports {name}, which is {relation}")
    return wrong


def _room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_imports_point_down(sources: list[Any], layers: list[list[str]]) -> None:
    known = {source.module for source in sources}
    wrong = [line for s in sources if s.room for line in upward(s.module, s.tree, known, layers)]
    assert wrong == []


def test_every_room_is_in_the_plan(sources: list[Any], layers: list[list[str]]) -> None:
    planned = {room for rooms in layers for room in rooms}
    assert {source.room for source in sources} - {"", "__main__"} == planned


def test_the_rule_sees_wrong_imports(layers: list[list[str]]) -> None:
    known = {"lmssl.train", "lmssl.train.run", "lmssl.optim", "lmssl.errors"}
    bad = "from lmssl.train.run import run\ndef f():\n    from lmssl import optim\n"
    assert upward("lmssl.model.head", ast.parse(bad), known, layers) == [
        "lmssl.model.head:1: imports lmssl.train.run, which is above it",
        "lmssl.model.head:3: imports lmssl.optim, which is a sibling",
    ]
    good = "from lmssl.errors import DataError\nif TYPE_CHECKING:\n    import lmssl.train\n"
    assert upward("lmssl.model.head", ast.parse(good), known, layers) == []


def test_light_modules_name_no_heavy_library(sources: list[Any]) -> None:
    wrong = []
    for source in _light(sources):
        for line, name in imports(source.tree, set(), inside_functions=False):
            if name.partition(".")[0] in HEAVY:
                wrong.append(f"{source.path}:{line}: imports {name} at module level")
    assert wrong == []


def test_light_modules_load_no_heavy_library(sources: list[Any], root: Path) -> None:
    modules = [source.module for source in _light(sources)]
    assert {"lmssl.cli", "lmssl.errors", "lmssl.shipped", "lmssl.show", "lmssl.model.flops"} <= set(modules)
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {HEAVY!r} & sys.modules.keys()\n"
        "    if loaded: sys.exit(f'{name} loads {sorted(loaded)}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_loader_processes_import_is_light(sources: list[Any], root: Path) -> None:
    """They unpickle objectives, whose modules load neither transformers nor torch's compiler: seconds and memory."""
    modules = [s.module for s in sources if s.module.startswith("lmssl.objective.")]
    modules = [name for name in modules if name not in ("lmssl.objective.build", "lmssl.objective.module")]
    assert "lmssl.objective.causal" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {['lmssl.data.batch', *sorted(modules)]!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'transformers', 'torch._dynamo'} & sys.modules.keys()\n"
        "    if loaded: sys.exit(f'{name} loads {sorted(loaded)}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_library_imported_is_declared(sources: list[Any], root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[\[<>=.]", line)[0].replace("-", "_") for line in lines}
    declared |= {module for name, module in OTHER_NAMES.items() if name in declared}
    wrong = [
        f"{source.path}:{line}: {name}"
        for source in sources
        for line, name in imports(source.tree, set())
        if name.partition(".")[0] not in declared | sys.stdlib_module_names
    ]
    assert wrong == []


def _light(sources: list[Any]) -> list[Any]:
    def is_light(module: str) -> bool:
        return module not in NOT_LIGHT and any(
            module == f"lmssl.{name}" or module.startswith(f"lmssl.{name}.") for name in LIGHT
        )

    return [source for source in sources if is_light(source.module)]
