"""Everything that must survive a restart, beside weights, optimiser and ledger."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


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
    """The next position to read."""
    skipped_steps: int = 0
    """Steps whose update was not made because a number was not finite."""
    consecutive_skips: int = 0
    interval: Interval = field(default_factory=Interval)
    evaluation: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""

    def to_json(self) -> str:
        """JSON; floats keep all their digits."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """The state that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "interval": Interval(**values["interval"])})
