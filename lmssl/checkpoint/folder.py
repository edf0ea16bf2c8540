"""Folders of checkpoints: which there are, whether they are whole, what they hold."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmssl.checkpoint.checksums import matches
from lmssl.checkpoint.tensors import TensorFiles
from lmssl.errors import CheckpointError

FORMAT = 3
"""Version of the layout that is written.

2 had no xxh128 in its manifest; 1 also had one file per group of tensors, and only format, step and files in it.
"""

READABLE = (1, 2, 3)
"""Versions that are read; what is not known is refused."""

_MAX_THREADS = 8
"""That read files."""

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
"""What a name begins with that is no checkpoint yet, or no more."""

_PART = re.compile(r"(?P<group>\w+?)(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint folder."""

    path: Path
    step: int
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def text(self, name: str) -> str:
        """Contents of one of its text files."""
        return (self.path / name).read_text(encoding="utf-8")

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of its groups of tensors, such as model, optim, ema."""
        found = (_PART.fullmatch(name) for name in self.manifest["files"])
        return tuple(dict.fromkeys(match["group"] for match in found if match))

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """Named tensors of a group, on CPU, each read from the disk when it is asked for.

        They are views of the files: copy what is to be changed.

        Raises:
            CheckpointError: it holds no such group.
        """
        if group not in self.groups:
            raise CheckpointError(
                f"it holds no tensors named {group}",
                where=str(self.path),
                remedy=f"there are {', '.join(self.groups)}",
            )
        names = [name for name in self.manifest["files"] if (m := _PART.fullmatch(name)) and m["group"] == group]
        return TensorFiles([self.path / name for name in sorted(names)])


def checkpoints_path(run: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run / "checkpoints"


def step_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return checkpoints_path(run) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a folder is named by."""
    return int(path.name.removeprefix("step-"))


def step_folders(run: Path) -> list[Path]:
    """Folders named as checkpoints, whole or not, by step."""
    found = (p for p in checkpoints_path(run).glob("step-*") if p.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of)


def tensor_file(group: str, rank: int, num_ranks: int) -> str:
    """Name of the file into which a rank writes its tensors of a group.

    >>> tensor_file("model", 0, 1), tensor_file("optim", 1, 2)
    ('model.safetensors', 'optim-00002-of-00002.safetensors')
    """
    part = "" if num_ranks == 1 else f"-{rank + 1:05d}-of-{num_ranks:05d}"
    return f"{group}{part}.safetensors"


def find_latest(run: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run; says which newer ones it passed over, and why."""
    for path in reversed(step_folders(run)):
        problem = validate(path)
        if problem is None:
            return _opened(path)
        report(f"checkpoint {path.name} is not used: {problem}")
    return None


def find_step(run: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest.

    Raises:
        CheckpointError: there is none, or it is damaged; names the steps there are.
    """
    problems: list[str] = []
    if step is None:
        found = find_latest(run, problems.append)
    else:
        path = step_path(run, step)
        problem = validate(path)
        found = _opened(path) if problem is None else None
        problems = [problem] if problem else []
    if found is None:
        steps = [step_of(path) for path in step_folders(run)]
        which = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"no valid checkpoint{which}: {'; '.join(problems) or 'none was saved'}",
            where=str(run),
            remedy=f"steps there: {', '.join(map(str, steps))}" if steps else "is this a run folder? Train first",
        )
    return found


def _opened(path: Path) -> Checkpoint:
    return Checkpoint(path, step_of(path), json.loads((path / MANIFEST).read_text(encoding="utf-8")))


def validate(path: Path, *, thoroughly: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None; reads every file, several at a time.

    Args:
        thoroughly: by every checksum in its manifest; else by the fastest.
    """
    try:
        manifest = read_manifest(path)
        if isinstance(manifest, str):
            return manifest
        files = manifest["files"]
        with ThreadPoolExecutor(max_workers=min(_MAX_THREADS, len(files) or 1)) as pool:
            found = pool.map(lambda name: matches(path / name, files[name], thoroughly=thoroughly), files)
            for name, match in zip(files, found, strict=True):
                if not match:
                    return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def read_manifest(path: Path) -> dict[str, Any] | str:
    """The manifest of a checkpoint folder, or what is wrong with it or with the sizes of the files that it names.

    Raises:
        FileNotFoundError: the manifest or one of its files is missing.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            return f"its format is {manifest['format']}, this version reads {known}"
        if manifest["step"] != step_of(path):
            return f"its manifest is that of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest names {name!r}, which lies outside"
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes instead of {expected['size']:,}, so it does not match its checksum"
        missing = _missing_part(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is unreadable ({type(error).__name__})"
    return f"{missing} is not in its manifest" if missing else dict(manifest)


def _missing_part(files: Mapping[str, Any]) -> str | None:
    """A file of several that should be among them and is not."""
    for match in map(_PART.fullmatch, files):
        count = int(match["count"] or 1) if match else 0
        for rank in range(count):
            assert match is not None
            name = tensor_file(match["group"], rank, count) if match["count"] else match.string
            if name not in files:
                return name
    return None


def discard_after(run: Path, step: int) -> list[int]:
    """Remove the checkpoints of later steps, so that the run goes on from this one; returns their steps.

    What is interrupted leaves the newest ones removed, never one in the middle.
    """
    removed = []
    for path in reversed(step_folders(run)):
        if step_of(path) > step:
            remove(path)
            removed.append(step_of(path))
    return removed[::-1]


def remove(path: Path, *, instead: Path | None = None) -> None:
    """Remove a checkpoint so that no half of it is ever found; what a kill leaves is swept later.

    Args:
        instead: a folder that takes its place.
    """
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    if instead is not None:
        instead.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what killed saves left behind; only where nothing is being saved."""
    for path in checkpoints_path(run).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
