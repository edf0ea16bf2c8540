"""What a run's folder knows about a checkpoint, gathered once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmssl.checkpoint import Checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe


@dataclass(frozen=True)
class Facts:
    """A checkpoint of a run, and what an export made of it."""

    run: Path
    found: Checkpoint
    num_parameters: int
    weights: Mapping[str, Any]
    """`ema`, `average` and `dtype` of the export."""

    @cached_property
    def recipe(self) -> Recipe:
        """As it was resolved."""
        return load_recipe(self.found.path / "recipe.yaml").recipe

    @cached_property
    def state(self) -> dict[str, Any]:
        """Of training, at the checkpoint."""
        found: dict[str, Any] = json.loads(self.found.text("state.json"))
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        found: dict[str, Any] = json.loads(self.found.text("config.json"))
        return found

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """Executions up to the checkpoint, the first one first."""
        return [row for row in _rows(self.run / "sessions.jsonl") if row.get("from_step", 0) <= self.found.step]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl up to the checkpoint."""
        return [row for row in _rows(self.run / "metrics.jsonl") if row.get("step", 0) <= self.found.step]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """What `lmssl eval` found of this step and these weights, the newest of each name."""
        if self.weights.get("average", 1) > 1:
            return []
        kept = "ema" if self.weights.get("ema") else None
        of_step = (row for row in _rows(self.run / "evaluations.jsonl") if row.get("step") == self.found.step)
        rows = [row for row in of_step if row.get("weights") == kept]
        newest = {(row.get("kind"), row.get("name")): row for row in rows if isinstance(row.get("metrics"), dict)}
        return list(newest.values())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each corpus among the positions that were read; empty where the ledger does not say."""
        try:
            stages = json.loads(self.found.text("ledger.jsonl").partition("\n")[0])["stages"]
            ends = [*(stage["first_position"] for stage in stages[1:]), self.state["cursor"]]
            read: dict[str, float] = {}
            for stage, end in zip(stages, ends, strict=True):
                count = max(0, min(end, self.state["cursor"]) - stage["first_position"])
                for name, share in zip(stage["corpora"], stage["shares"], strict=True):
                    read[name] = read.get(name, 0.0) + count * share / sum(stage["shares"])
            total = sum(read.values())
            return {name: count / total for name, count in read.items()} if total else {}
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            return {}

    @cached_property
    def left_out(self) -> dict[str, int]:
        """What the text of first epochs lost on the way, by the ledger's names; empty where the ledger does not say."""
        total: dict[str, int] = {}
        for line in self.found.text("ledger.jsonl").split("\n")[1:-1]:
            row = json.loads(line)
            if row["epoch"] == 0:  # later ones read the same text again
                for name in ("num_bad", *(name for name in row if name.startswith("num_dropped_"))):
                    total[name] = total.get(name, 0) + row[name]
        return total


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON objects; a run in progress may be writing the last."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
