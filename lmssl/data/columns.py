"""Small arrays beside the token chunks: `.npy` files that carry a checksum behind their data.

They are written under another name and renamed, and whoever reads one recognises damage.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_CHECKSUM_BYTES = 16


def store_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Write an array to a file that `np.load` reads as well; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, values)
    content = buffer.getvalue()
    building = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        building.write_bytes(content + _checksum(content))
        building.rename(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def stored_array(path: Path) -> npt.NDArray[Any] | None:
    """What `store_array` wrote, or None where the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if _checksum(content[:-_CHECKSUM_BYTES]) != content[-_CHECKSUM_BYTES:]:
        return None
    values: npt.NDArray[Any] = np.load(io.BytesIO(content))
    return values


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()
