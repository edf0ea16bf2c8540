"""Checksums of files: sha256, which any tool can compare, and xxh128, which finds damage fast."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash


class Digest(Protocol):
    """A checksum in the making."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The checksum so far."""


CHECKSUMS: Mapping[str, Callable[[], Digest]] = {"sha256": hashlib.sha256, "xxh128": xxhash.xxh128}
"""Name in a manifest -> what begins it."""

_BLOCK_BYTES = 2**20


def fingerprint(path: Path, checksums: Collection[str] = tuple(CHECKSUMS)) -> dict[str, Any]:
    """Size in bytes of a file, and its checksums by name; reads it once."""
    digests = {name: CHECKSUMS[name]() for name in checksums}
    with path.open("rb") as file:
        while data := file.read(_BLOCK_BYTES):
            for digest in digests.values():
                digest.update(data)
        found = {name: digest.hexdigest() for name, digest in digests.items()}
        return {"size": os.fstat(file.fileno()).st_size, **found}


def matches(path: Path, expected: Mapping[str, Any], *, thoroughly: bool = False) -> bool:
    """Whether a file is as a manifest says.

    Damage gets past xxh128 once in 2^128 times, and it costs a fortieth of sha256; manifests before format 3 have only
    sha256.

    Args:
        expected: its size and checksums by name.
        thoroughly: compare every checksum that is there.
    """
    known = [name for name in ("xxh128", "sha256") if name in expected] or ["sha256"]
    found = fingerprint(path, known if thoroughly else known[:1])
    return all(expected.get(name) == value for name, value in found.items())
