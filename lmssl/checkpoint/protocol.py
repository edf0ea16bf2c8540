"""One save, step by step; every rank takes the same steps, and an error of one is raised on all.

1. What all ranks will write must fit on the disk. Rank 0 sweeps leftovers and makes `.tmp-step-N`.
2. Each rank writes its files, hashing them on the way, waits for the disk and reads them back from it.
3. Rank 0 writes the manifest, waits for the disk, renames the folder and waits for its parent.
4. Rank 0 prunes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch import Tensor

from lmssl.checkpoint.checksums import fingerprint, matches
from lmssl.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    TEMPORARY,
    checkpoints_path,
    discard_after,
    find_latest,
    remove,
    step_path,
    sweep,
    sync_folder,
    tensor_file,
    write_synced,
)
from lmssl.checkpoint.keep import Keep, prune
from lmssl.checkpoint.space import free_bytes, require_space, shown_bytes
from lmssl.checkpoint.tensors import write_tensors
from lmssl.errors import CheckpointError, LmsslError

Groups = Mapping[str, Mapping[str, Tensor]]
"""Group, such as model, optim or ema -> name -> float32 tensor on CPU."""


class Meeting(Protocol):
    """What ranks meet by; every rank calls it equally often, and nothing else uses it."""

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, by rank.

        Raises:
            OSError: a rank is gone.
        """


class Alone:
    """The meeting of one rank."""

    def exchange(self, text: str) -> list[str]:
        """Its own text."""
        return [text]


@dataclass(frozen=True)
class Job:
    """What a save writes; nobody changes it any more."""

    step: int
    tensors: Groups
    texts: Mapping[str, str]
    facts: Mapping[str, Any]
    num_bytes: int
    """Of all ranks."""


@dataclass(frozen=True)
class RankWriter:
    """The part of one rank in the saves of a run."""

    run: Path
    rank: int
    num_ranks: int
    meeting: Meeting
    keep: Keep
    progress: Callable[[], None]
    """Called for each file that is written or read back."""

    def prepare(
        self, step: int, tensors: Callable[[], Groups], texts: Mapping[str, str], facts: Mapping[str, Any]
    ) -> Job:
        """The copies of the tensors, and a folder to write them to on a disk that holds them all.

        Raises:
            CheckpointError: on every rank; nothing was written.
        """
        copies: list[Groups] = []

        def measure() -> list[int]:
            if self.rank == 0:
                sweep(self.run)
            copies.append(tensors())
            size = sum(t.numel() * t.element_size() for named in copies[0].values() for t in named.values())
            if self.rank == 0:
                size += sum(len(text.encode()) for text in texts.values())
            return [size, free_bytes(self.run)]

        sizes = self._together(step, measure)
        num_bytes = sum(size for size, _ in sizes)
        self._together(step, lambda: self._begin(step, num_bytes, free=sizes[0][1]))
        return Job(step, copies[0], texts, facts, num_bytes)

    def _begin(self, step: int, num_bytes: int, *, free: int) -> None:
        require_space(self.run, num_bytes, free=free)
        if self.rank == 0:
            checkpoints_path(self.run).mkdir(parents=True, exist_ok=True)
            self._partial(step).mkdir()

    def write(self, job: Job) -> list[str]:
        """Steps 2 to 4; returns what a person should know of the last.

        Raises:
            CheckpointError: on every rank; the partial folder is gone, earlier checkpoints are intact.
        """
        files = self._together(job.step, lambda: self._write_files(job))
        merged = {name: file for written in files for name, file in written.items()}
        self._together(job.step, lambda: self._publish(job, merged))
        notes: list[str] = []
        if self.rank == 0:
            prune(self.run, self.keep, verified_step=job.step, report=notes.append)
        return notes

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps; no rank goes on before they are gone.

        Raises:
            CheckpointError: on every rank; some may be left.
        """
        self._together(step, lambda: discard_after(self.run, step) if self.rank == 0 else None)

    def _write_files(self, job: Job) -> dict[str, dict[str, Any]]:
        partial = self._partial(job.step)
        if not partial.is_dir():
            raise OSError(f"rank {self.rank} does not see {partial}; all ranks must write to one shared file system")
        written = {}
        for group, named in job.tensors.items():
            name = tensor_file(group, self.rank, self.num_ranks)
            written[name] = write_tensors(partial / name, named)
            self.progress()
        for name, text in job.texts.items() if self.rank == 0 else ():
            write_synced(partial / name, text)
            written[name] = fingerprint(partial / name)
        for name, expected in written.items():
            _forget_cached(partial / name)
            if not matches(partial / name, expected):
                raise OSError(f"{name} was read back otherwise than it was written; the disk or the memory is faulty")
            self.progress()
        return written

    def _publish(self, job: Job, files: Mapping[str, Any]) -> None:
        if self.rank != 0:
            return
        partial, target = self._partial(job.step), step_path(self.run, job.step)
        manifest = {"format": FORMAT, "step": job.step, **job.facts, "num_ranks": self.num_ranks, "files": files}
        write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
        sync_folder(partial)
        if target.exists():  # damaged, or of a way that was given up
            remove(target, instead=partial)
        else:
            partial.rename(target)
        sync_folder(target.parent)

    def _partial(self, step: int) -> Path:
        target = step_path(self.run, step)
        return target.with_name(TEMPORARY + target.name)

    def _together(self, step: int, work: Callable[[], Any]) -> list[Any]:
        """What the work returned on every rank, by rank.

        Raises:
            CheckpointError: the work failed on a rank; raised on all, when nothing of the save is left.
        """
        reply: dict[str, Any] = {"value": None, "error": None, "remedy": None}
        cause: Exception | None = None
        try:
            reply["value"] = work()
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            cause = error
            reply |= {"error": self._explained(error), "remedy": _remedy(error)}
        try:
            replies = [json.loads(text) for text in self.meeting.exchange(json.dumps(reply))]
        except OSError as error:
            replies = [{"error": f"a rank is gone: {error}", "remedy": None}]
            cause = cause or error
        if any(reply["error"] for reply in replies):
            self._give_up(step, replies, cause)
        return [reply["value"] for reply in replies]

    def _explained(self, error: Exception) -> str:
        if isinstance(error, CheckpointError):
            return error.what
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return f"{error}; {shown_bytes(free_bytes(self.run))} are free" if full else str(error)
        return f"{type(error).__name__}: {error}"

    def _give_up(self, step: int, replies: list[dict[str, Any]], cause: Exception | None) -> NoReturn:
        """Remove what was begun, prove what is there, and say both on every rank."""
        intact = ""
        if self.rank == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            intact = self._intact()
        try:
            intact = self.meeting.exchange(intact)[0]
        except OSError:
            intact = intact or "earlier checkpoints are intact"
        told = {reply["error"]: rank for rank, reply in reversed(list(enumerate(replies))) if reply["error"]}
        several = self.num_ranks > 1 and len(told) < self.num_ranks
        shown = "; ".join(f"rank {rank}: {what}" if several else what for what, rank in reversed(told.items()))
        remedy = next((reply["remedy"] for reply in replies if reply["remedy"]), "run the same command")
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {shown}",
            where=str(step_path(self.run, step)),
            remedy=f"{remedy}; {intact}",
        ) from cause

    def _intact(self) -> str:
        damaged: list[str] = []
        found = find_latest(self.run, damaged.append)
        what = "there is no earlier checkpoint" if found is None else f"the checkpoint of step {found.step} is intact"
        return "; ".join([what, *damaged])


def _remedy(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return "free disk space or fix permissions, then run the same command"
    if isinstance(error, LmsslError):
        return error.remedy
    return "see where it failed with --debug, then run the same command"


def _forget_cached(path: Path) -> None:
    """Ask the system to read a file from the disk next time, not from its memory."""
    advise = getattr(os, "posix_fadvise", None)  # not on macOS
    if advise is not None:
        with path.open("rb") as file:
            advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
