"""Everything that must survive a restart, beside weights, optimiser and ledger."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Interval:
    """Sums since the last line of metrics; kept with the state so that a restart changes no line."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    num_bytes: float = 0.0
    num_padding_tokens: int = 0
    num_steps: int = 0


@dataclass
class TrainState:
    """Where the run is; every number is exact, so JSON restores it bit for bit."""

    step: int = 0
    """Completed optimiser steps."""
    tokens_seen: int = 0
    """Positions x sequence_length consumed, padding included."""
    cursor: int = 0
    """The next position to read, outside `skip`."""
    skip: tuple[tuple[int, int], ...] = ()
    """Ranges of positions that the run leaves out, as the recipe had them when this was saved."""
    skipped_steps: int = 0
    """Steps whose update was not made, because a number was not finite or far out of line."""
    overflow_steps: int = 0
    """Steps whose update was not made because gradients overflowed in float16; not counted as skipped."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """What `train.precision=fp16` multiplies the loss by, and how long it has been so; else empty."""
    consecutive_skips: int = 0
    spikes: int = 0
    """Steps that were far out of line, whether their update was made or not."""
    recent: list[tuple[int, float, float]] = field(default_factory=list)
    """(step from 0, loss, gradient norm) of the latest finite steps, which later ones are compared with."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Times when the run went back to a checkpoint: `from_step`, `to_step`, and the positions it left out, `skip`."""
    elapsed_seconds: float = 0.0
    """Of all sessions, where `train.max_hours` limits them; else 0."""
    interval: Interval = field(default_factory=Interval)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The latest evaluation; where there are validation sets, also theirs, under `sets`."""
    epochs: dict[str, float] = field(default_factory=dict)
    """Epochs of each corpus up to the cursor."""

    def to_json(self) -> str:
        """JSON; floats keep all their digits."""
        found = asdict(self)
        recent = json.dumps(found.pop("recent"))
        return f'{json.dumps(found, indent=1)[:-2]},\n "recent": {recent}\n}}'

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """The state that `to_json` wrote."""
        values = json.loads(text)
        skip = tuple((start, end) for start, end in values.get("skip", ()))
        recent = [(step, loss, norm) for step, loss, norm in values.get("recent", ())]
        known = {"interval": Interval(**values["interval"]), "skip": skip, "recent": recent}
        return cls(**{**values, **known})
