"""metrics.jsonl: one JSON object a line, each step once, clock fields apart under `time`."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmssl.errors import CheckpointError
from lmssl.evaluate.loss import mean
from lmssl.train.console import Report
from lmssl.train.state import Interval, TrainState
from lmssl.train.step import Measured


def add_measured(interval: Interval, measured: Measured) -> bool:
    """Add a step to the running sums; returns whether its update was made. Reads the device."""
    finite = bool(measured.finite.item())
    interval.num_steps += 1
    interval.num_padding_tokens += int(measured.num_padding_tokens.item())
    if finite:
        for term, value in measured.sums.items():
            interval.sums[term] = interval.sums.get(term, 0.0) + float(value.item())
            interval.counts[term] = interval.counts.get(term, 0) + int(measured.counts[term].item())
        interval.num_bytes += float(measured.num_bytes.item())
    return finite


def interval_metrics(
    interval: Interval, *, num_tokens: int, knows_bytes: bool, metrics: Collection[str] = ()
) -> dict[str, Any]:
    """Loss in nats per target, bits per byte and padding share of an interval; None where nothing was predicted.

    Args:
        metrics: sums that are no losses and stand under their own names, the objective's `metrics`.
        num_tokens: of the interval's steps, padding included.
        knows_bytes: whether the bytes of text of all corpora are known; else there are no bits per byte.
    """
    row: dict[str, Any] = {}
    for index, (term, total) in enumerate(interval.sums.items()):
        label = term if term in metrics else "loss" if index == 0 else f"loss_{term}"
        row[label] = mean(total, interval.counts[term])
    first = next(iter(interval.sums.values()), math.nan)
    row["num_targets"] = next(iter(interval.counts.values()), 0)
    known = knows_bytes and row["num_targets"]
    row["bits_per_byte"] = mean(first / math.log(2), interval.num_bytes) if known else None
    row["padding_ratio"] = interval.num_padding_tokens / max(1, num_tokens)
    return row


class MetricsLog:
    """Appends lines to metrics.jsonl. A line that cannot be written waits for the next one, and training goes on."""

    def __init__(self, path: Path, state: TrainState, report: Report) -> None:
        """Open the file as a run left it whose state this is: lines of what comes after are cut off.

        Raises:
            CheckpointError: it cannot be written, as on a disk that is full already.
        """
        self.path = path
        self._report = report
        self._warned = False
        self._waiting: list[str] = []
        rows = ((line, json.loads(line)) for line in _whole_lines(path))
        kept = "".join(f"{line}\n" for line, row in rows if _holds(row, state))
        partial = path.with_name(path.name + ".tmp")
        try:
            partial.write_text(kept, encoding="utf-8")
            os.replace(partial, path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"the metrics cannot be written: {error}", where=str(path), remedy="free disk space, or fix permissions"
            ) from error
        self._size = len(kept.encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append one line, after those that wait, and hand it to the operating system."""
        self._waiting.append(json.dumps(row) + "\n")
        try:
            while self._waiting:
                data = self._waiting[0].encode()
                if self._file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._size += len(data)
                self._waiting.pop(0)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Leave no half line behind, and say so once."""
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), self._size)
        if not self._warned:
            self._warned = True
            self._report(f"{self.path} cannot be written, training goes on and tries again at the next line: {error}")

    def sync(self) -> None:
        """Wait until the lines so far are on the disk: what a checkpoint has done is not made and written again."""
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _holds(row: dict[str, Any], state: TrainState) -> bool:
    """Whether a line is of what a run has done whose state this is."""
    step = row["step"]
    if row.get("action") == "rollback":
        return bool(row["rollback"] <= len(state.rollbacks) and step <= state.step)
    if row["kind"] in ("evaluate", "suite") and step == state.step and state.evaluation.get("step") != step:
        return False  # a signal ended it before it was saved, and it is made again
    return bool(0 < state.step >= step)


def _whole_lines(path: Path) -> list[str]:
    """Lines that are whole JSON objects: a kill can cut the last one short."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break
        found.append(line)
    return found
