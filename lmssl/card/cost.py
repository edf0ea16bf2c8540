"""What a run cost: hours, operations and, where the devices are known, energy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lmssl.card.facts import Facts
from lmssl.model import flops
from lmssl.model.source import stand_in
from lmssl.show import target_ratio

_WATTS = {
    "B200": 1000, "H200 NVL": 600, "H200": 700, "H100 PCIe": 350, "H100 NVL": 400, "H100": 700, "A100-SXM4": 400,
    "A100-PCIE": 250, "A100 80GB PCIe": 300, "L40S": 350, "L4": 72, "A10": 150, "RTX 4090": 450, "RTX 3090": 350,
}  # fmt: skip
"""Rated power of a board, by part of the name that CUDA gives it; the first that fits counts.

Source: NVIDIA's data sheets.
"""

OVERHEAD = 1.2
"""Power of a data centre / that of its devices, as people assume it where nothing was measured."""


@dataclass(frozen=True)
class Cost:
    """Of all steps up to a checkpoint; repeated and rolled back steps are not in it."""

    hours: float
    """By the wall clock, evaluation included."""
    devices: str
    flops: float | None
    """None: no formula for the model."""
    kilowatt_hours: float | None
    """None: the power of a device is not known."""
    watts: int | None
    """Of one device."""


def cost(facts: Facts) -> Cost:
    """Sum up a run's metrics and sessions."""
    rows = [row.get("time", {}) for row in facts.metrics]
    hours = sum(float(time.get("seconds") or 0) for time in rows if isinstance(time, dict)) / 3600
    last = facts.sessions[-1] if facts.sessions else {}
    name, count = str(last.get("device", "unknown")), int(last.get("processes", 1))
    kinds = {(row.get("device"), row.get("processes")) for row in facts.sessions}
    watts = rated_watts(name) if len(kinds) == 1 else None
    energy = None if watts is None else hours * count * watts * OVERHEAD / 1000
    devices = f"{count} x {name}" if count > 1 else name
    if name == "cpu" and "threads" in last:
        threads = int(last["threads"])
        devices += f", {threads} thread{'s' * (threads != 1)}" + (" each" if count > 1 else "")
    if len(kinds) > 1:
        devices += " at the end; others before"
    return Cost(hours, devices, training_flops(facts), energy, watts)


def rated_watts(device: str) -> int | None:
    """Of one device, or None where it is not known. A slice of a device is not known.

    >>> rated_watts("NVIDIA H200"), rated_watts("NVIDIA H200 MIG 1g.18gb"), rated_watts("cpu")
    (700, None, None)
    """
    if re.search(r"\bMIG\b", device):
        return None
    named = (watts for name, watts in _WATTS.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device))
    return next(named, None)


def training_flops(facts: Facts) -> float | None:
    """Operations of all steps, by the formulas that `lmssl show` uses; None where there is none for the model."""
    recipe, plan = facts.recipe, facts.recipe.batches
    model, _ = stand_in(recipe.model)
    if not flops.has_formula(model):
        return None
    total = 0.0
    for length, tokens in _tokens_by_length(facts):
        per_token = flops.trained_flops_per_token(
            model,
            recipe.objective,
            vocab_size=int(facts.config["vocab_size"]),
            sequence_length=length,
            target_ratio=target_ratio(recipe.objective),
        )
        total += per_token * tokens
    return total if plan.num_steps and math.isfinite(total) else None


def _tokens_by_length(facts: Facts) -> Iterator[tuple[int, int]]:
    plan, step = facts.recipe.batches, facts.found.step
    tokens = 0
    for made in range(step):
        tokens += plan.num_tokens(made)
        if made + 1 == step or plan.sequence_length(made + 1) != plan.sequence_length(made):
            yield plan.sequence_length(made), tokens
            tokens = 0
