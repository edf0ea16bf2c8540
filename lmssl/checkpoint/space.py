"""Room on the disk, asked for before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lmssl.checkpoint.folder import step_folders
from lmssl.errors import CheckpointError


def shown_bytes(num_bytes: int) -> str:
    """A number of bytes for people.

    >>> shown_bytes(812), shown_bytes(612_345_678), shown_bytes(7_000_000_000_000)
    ('812 bytes', '612.3 MB', '7,000.0 GB')
    """
    if num_bytes < 100_000:
        return f"{num_bytes:,} bytes"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.1f} GB"


def free_bytes(folder: Path) -> int:
    """What a process without privileges may still write where a folder is, or will be; quotas are not known."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def require_space(run: Path, num_bytes: int, *, free: int) -> None:
    """Refuse to begin a checkpoint that does not fit.

    Raises:
        CheckpointError: names the bytes that it needs and those that are free.
    """
    if num_bytes > free:
        raise CheckpointError(
            f"a checkpoint needs {num_bytes:,} bytes ({shown_bytes(num_bytes)}) and the disk has {free:,} free",
            where=str(run),
            remedy=f"free at least {shown_bytes(num_bytes - free)}, or choose another out",
        )


def check_space(run: Path, num_bytes: int, *, num_checkpoints: int, report: Callable[[str], None]) -> None:
    """At the start of a run: refuse where not one checkpoint fits, warn where not all fit that will be kept.

    Args:
        num_bytes: of one checkpoint.
        num_checkpoints: how many will exist at once, that being written included.
    Raises:
        CheckpointError: not even one fits.
    """
    free = free_bytes(run)
    require_space(run, num_bytes, free=free)
    present = len(step_folders(run))
    needed = num_bytes * max(1, num_checkpoints - present)
    if needed > free:
        report(
            f"the disk of {run} has {shown_bytes(free)} free, and {num_checkpoints} checkpoints of "
            f"{shown_bytes(num_bytes)} will be there at once, {present} are: free {shown_bytes(needed - free)} "
            "or keep fewer (checkpoint.keep_last)"
        )
