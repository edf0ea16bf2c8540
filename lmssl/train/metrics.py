"""metrics.jsonl: one JSON object a line, each step once, clock fields apart under `time`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lmssl.evaluate.loss import mean
from lmssl.train.state import Interval
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
    """Appends lines to metrics.jsonl; opened at a step, later lines are cut off first."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if step else []
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
