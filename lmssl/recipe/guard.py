"""The section `guard`: what a run does about losses and gradients that are out of line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmssl.recipe.base import Float, Int, Section


class GuardSection(Section):
    """Spikes of loss or gradient norm, and the way back after steps that could not be made."""

    spike: Literal["off", "log", "skip"] = "log"
    """A step far above those before: nothing, a line in metrics.jsonl, or a line and no update."""
    window_steps: Int = Field(default=128, ge=8)
    """Steps that a step is compared with."""
    deviations: Float = Field(default=6.0, gt=0)
    """Robust standard deviations above their median from which a step is a spike."""
    max_rollbacks: Int = Field(default=2, ge=0)
    """How often the run may go back to its last good checkpoint and leave out what it read since; then it stops."""
