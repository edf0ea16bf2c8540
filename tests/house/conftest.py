"""The source files, parsed once, and the rooms of docs/design.md."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Source:
    """One Python file of the package."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The part of the house it belongs to; empty for `lmssl/__init__.py`."""
        return self.module.partition(".")[2].partition(".")[0]


@pytest.fixture(scope="session")
def sources(root: Path) -> list[Source]:
    """Every Python file below `lmssl/`."""
    found = []
    for path in sorted((root / "lmssl").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(root), module, text, ast.parse(text)))
    assert len(found) > 10
    return found


@pytest.fixture(scope="session")
def layers(root: Path) -> list[list[str]]:
    """Rooms from top to bottom, as docs/design.md draws them; rooms of one layer are siblings."""
    line = re.search(r"Imports point down: `([^`]+)`", (root / "docs/design.md").read_text(encoding="utf-8"))
    assert line is not None, "docs/design.md no longer says where imports point"
    return [[room.strip() for room in layer.split("|")] for layer in line[1].split(">")]


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Files that belong to the project: git's, or everything in an unpacked source distribution."""
    if (root / ".git").exists():
        command = [
            "git",
            "-c",
            "safe.directory=*",
            "-C",
            str(root),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        paths = [root / name for name in names if name]
    else:
        paths = [
            path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    return [path for path in paths if path.is_file()]
