"""Finds the recipes and tokenizers that come with lmssl, in a checkout or an installed wheel."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("recipes", "tokenizer")


def shipped_root() -> Path:
    """The folder that holds the shipped `recipes/` and `tokenizer/`."""
    package = Path(__file__).resolve().parent
    installed = package / "_shipped"
    return installed if installed.is_dir() else package.parent


def find(path: str | Path) -> Path:
    """The path as given if it exists; else its shipped copy if it has one; else the path as given."""
    given = Path(path).expanduser()
    if given.exists() or given.is_absolute() or not given.parts or given.parts[0] not in FOLDERS:
        return given
    copy = shipped_root() / given
    inside = copy.resolve().is_relative_to((shipped_root() / given.parts[0]).resolve())
    return copy if inside and copy.exists() else given
