"""The section `train`: budget, batch and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmssl.recipe.base import Float, Int, Section
from lmssl.recipe.batches import Ramp


class BatchWarmup(Section):
    """Small batches first: the tokens of a step grow in a straight line with the tokens read."""

    from_tokens: Int = Field(ge=1)
    """Tokens of the first step; a multiple of `data.sequence_length`."""
    tokens: Int = Field(ge=1)
    """Tokens of the run over which a step grows to `train.batch_tokens`."""


class TrainSection(Section):
    """Budget, batch and precision."""

    tokens: Int = Field(ge=1)
    """Training budget: positions x sequence_length, padding included."""
    max_hours: Float | None = Field(default=None, gt=0)
    """Hours of training, those of earlier sessions included, after which the run ends, decayed; null: no limit."""
    batch_tokens: Int = Field(ge=1)
    """Tokens of one optimiser step over all devices; a multiple of `data.sequence_length`."""
    batch_warmup: BatchWarmup | None = None
    """Smaller steps at the beginning; null: all steps are equal."""
    micro_batch_sequences: Int = Field(ge=1)
    """Sequences of one forward on one device; only memory and speed depend on it."""
    precision: Literal["auto", "bf16", "fp32", "fp16", "fp8"] = "auto"
    """Type of matrix products; `auto`: bf16 where the device multiplies it, else fp32, kept when the run goes on.

    Weights and optimiser stay fp32. fp16 scales the loss; fp8 needs a GPU and torchao.
    """
    activation_checkpointing: Literal["full"] | Annotated[Int, Field(ge=1)] | None = None
    """Layers compute their inside again in the backward pass instead of keeping it: `full` all, k every k-th."""
    compile: Literal["auto", "off", "layers", "model"] = "auto"
    """torch.compile: whole model, each layer, or off; `auto`: model on CPU, layers elsewhere, off for short runs."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Kernels of our own, not torch's, on x86 CPUs with AVX2 or more; `auto`: not for runs too short to build them."""
    deterministic: bool | None = None
    """Bit-exact repeats on one machine; null: on for CPU, where it costs nothing."""
    log_every_steps: Int = Field(default=10, ge=1)
    """Interval of lines in metrics.jsonl."""
    max_skipped_steps: Int = Field(default=10, ge=0)
    """Consecutive steps without an update before the run goes back to its last good checkpoint; see `guard`."""
    hang_seconds: Int | None = Field(default=1800, ge=1)
    """Without any progress, after which the run ends and names the rank that hangs; null: it waits for ever."""
    ema_decay: Float | None = Field(default=None, gt=0, lt=1)
    """What a moving average of the weights keeps of itself per step, such as 0.999; null: there is none."""

    @property
    def ramp(self) -> Ramp:
        """How the tokens of a step grow."""
        warmup = self.batch_warmup
        if warmup is None:
            return Ramp(self.batch_tokens, self.batch_tokens, 0)
        return Ramp(min(warmup.from_tokens, self.batch_tokens), self.batch_tokens, warmup.tokens)
