"""One run per folder: a lock that the operating system gives back however its owner ends.

`.lock` is locked by the main process of the run, `.lock-owner.json` says who that is. A process that an owner left
behind can hold the lock after the owner's death; then the file is replaced by a new one.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lmssl.errors import CheckpointError

LOCK, OWNER, TAKEOVER = ".lock", ".lock-owner.json", ".lock-takeover"


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock: FileLock | None = None

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._lock is not None

    def acquire(self) -> str | None:
        """Take the lock of an existing folder; returns a sentence worth knowing, or None.

        Raises:
            CheckpointError: another run has it; names its host, process and start.
            OSError: the folder cannot be written.
        """
        if self.held:
            return None
        try:
            # Two that find the same dead owner must not each replace the other's new lock.
            with FileLock(self._run / TAKEOVER, timeout=10):
                return self._take()
        except Timeout as error:
            raise self._refusal() from error
        except OSError as error:
            if isinstance(error, PermissionError | FileNotFoundError):
                raise
            return f"this file system has no locks ({error}): nothing keeps another run out of {self._run}"

    def _take(self) -> str | None:
        said = None
        lock = FileLock(self._run / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            owner = self._owner()
            if owner.get("host") != socket.gethostname() or _is_alive(owner):
                raise
            (self._run / LOCK).unlink(missing_ok=True)
            lock = FileLock(self._run / LOCK, timeout=0)
            lock.acquire()
            said = f"took the run folder over from process {owner.get('pid')}, which is dead but left another running"
        self._lock = lock
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        partial = self._run / f"{OWNER}.tmp"
        partial.write_text(json.dumps(about), encoding="utf-8")
        partial.replace(self._run / OWNER)
        return said

    def release(self) -> None:
        """Give it back; harmless where it is not held."""
        if self._lock is not None:
            with suppress(OSError):  # a disk that became read-only; the next owner writes another
                (self._run / OWNER).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads((self._run / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refusal(self) -> CheckpointError:
        owner = self._owner()
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
        return CheckpointError(
            f"another run is at work in {self._run}: {who}",
            where=str(self._run / LOCK),
            remedy="wait for it or stop it, or choose another out",
        )


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is there; one that was given its number meanwhile passes for it."""
    try:
        return bool(psutil.Process(int(owner["pid"])).status() != psutil.STATUS_ZOMBIE)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, ValueError, TypeError):
        return False


def is_lock_file(path: Path) -> bool:
    """Whether a file in a run folder belongs to the lock."""
    return path.name.startswith(LOCK)
