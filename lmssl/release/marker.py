"""The marker of an export: which run and step it is of, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmssl.errors import ExportError

MARKER = "lmssl.json"
"""Its name in an export."""

FORMAT = 1
"""Version of what it says."""


def source_of(checkpoint: Path, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the weights of an export: the checkpoint, by its manifest, and what was made of it."""
    manifest = (checkpoint / "manifest.json").read_bytes()
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return {
        "step": state["step"],
        "tokens": state["tokens_seen"],
        "checkpoint": hashlib.sha256(manifest).hexdigest(),
        **weights,
    }


def run_identity(run: Path) -> str:
    """The same for all exports of a run and of its copies, and of no other run: a hash of how it was first begun."""
    sessions = run / "sessions.jsonl"
    first = sessions.read_text(encoding="utf-8").partition("\n")[0] if sessions.exists() else run.resolve().name
    return hashlib.sha256(first.encode()).hexdigest()[:16]


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write a marker with the checksums of all files of a folder; it is the last file of an export."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    files = {path.relative_to(folder).as_posix(): checksum(path) for path in paths}
    text = json.dumps({**marker, "format": FORMAT, "files": files}, indent=1)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of an export; empty where there is none.

    Raises:
        ExportError: it is no marker.
    """
    path = folder / MARKER
    return parse_marker(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else {}


def parse_marker(text: str, where: str) -> dict[str, Any]:
    """The marker in a text.

    Raises:
        ExportError: it is none.
    """
    try:
        found = json.loads(text)
        if found["format"] != FORMAT or not isinstance(found["identity"], str):
            raise ValueError
        marker: dict[str, Any] = {**found, "files": dict(found["files"])}
        return marker
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            "this is no marker of an export that this version reads", where=where, remedy="export again with lmssl"
        ) from error


def checksum(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
