"""Experiment trackers beside metrics.jsonl, in a thread of their own: nothing of them can stop or slow training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from lmssl.train.console import Report

_WAITING_ROWS = 1000
_FAREWELL_SECONDS = 20.0
_TAKE_TEXTS = ("tensorboard", "wandb")
"""Trackers that show a text as one."""


class Trackers:
    """Hands numbers to accelerate's trackers; what fails is said once, and training goes on without.

    Beginning a tracker, sending and ending it can each take for ever where a network is involved, and some remember
    the thread that began them; so one thread does all of it.
    """

    def __init__(
        self, accelerator: Accelerator, wanted: Sequence[str], name: str, config: Mapping[str, Any], report: Report
    ) -> None:
        """Args: `wanted`: names of trackers; `name`: the run's; `config`: the recipe, flat and of plain values."""
        self._accelerator, self._name, self._config, self._report = accelerator, name, dict(config), report
        self._wanted = tuple(wanted)
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING_ROWS)
        self._warned = False
        begin = bool(self._wanted) and accelerator.is_main_process
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True) if begin else None

    def __enter__(self) -> Trackers:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what waits, for a while."""
        if self._thread is None:
            return
        with suppress(queue.Full):
            self._rows.put(None, timeout=_FAREWELL_SECONDS)
            self._thread.join(_FAREWELL_SECONDS)
        self._accelerator.trackers = []  # accelerate would end them once more
        if self._thread.is_alive():
            self._warn("it does not answer; what it has not taken yet is in metrics.jsonl")

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand over the numbers of a line of metrics, and the texts of samples."""
        if self._thread is None:
            return
        texts = {name: value for name, value in row.items() if isinstance(value, str) and name.startswith("sample/")}
        try:
            self._rows.put_nowait(flat_numbers(row) | texts)
        except queue.Full:
            self._warn("it is too slow; lines are left out, and are in metrics.jsonl")

    def _run(self) -> None:
        taken = {str(getattr(name, "value", name)) for name in self._accelerator.log_with}
        if not taken.issuperset(self._wanted):
            self._warn("accelerate does not find its package whole")
        try:
            self._accelerator.init_trackers(self._name, config=self._config)
        except Exception as error:
            self._warn(f"it cannot begin: {error!r}")
            return
        while (row := self._rows.get()) is not None:
            try:
                texts = {name: row.pop(name) for name in list(row) if isinstance(row[name], str)}
                self._accelerator.log(row, step=row["step"])
                for tracker in self._accelerator.trackers if texts else ():
                    if tracker.name in _TAKE_TEXTS:
                        tracker.log(texts, step=row["step"])
            except Exception as error:
                self._warn(str(error) or repr(error))
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"it cannot end: {error!r}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._report(f"a tracker ({', '.join(self._wanted)}) failed, training goes on: {what}")


def flat_numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers of a row, those of inner mappings under joined names.

    >>> flat_numbers({"kind": "train", "step": 3, "time": {"mfu": 0.5}, "sets": None})
    {'step': 3, 'time/mfu': 0.5}
    """
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found
