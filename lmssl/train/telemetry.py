"""What a line of metrics says of time, speed and memory: it differs between equal runs, and stands under `time`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from lmssl.model import flops
from lmssl.model.source import stand_in
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.sections import Recipe
from lmssl.show import target_ratio
from lmssl.train import phases as named
from lmssl.train.peaks import peak_flops
from lmssl.train.phases import Phases

STEP_PHASES = (named.DATA, named.COUNTS, named.COMPUTE, named.EXCHANGE, named.UPDATE)
_APART = (named.EVALUATE, named.SAVE)
"""Left out of the time of steps."""


class Telemetry:
    """Reads the clock, the device and this process once per line."""

    def __init__(
        self,
        recipe: Recipe,
        phases: Phases,
        device: torch.device,
        *,
        num_ranks: int,
        vocab_size: int,
        step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: `step`: completed ones."""
        self._step = step
        self._phases, self._device, self._clock = phases, device, clock
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name, recipe.train.precision)
        self._peak = None if peak is None else peak * num_ranks
        self._per_token = flops_per_token(recipe, vocab_size)
        self._process = psutil.Process()
        phases.enter(named.LOOP)
        phases.read()
        self._read_at = clock()

    def read(self, step: int, plan: BatchPlan) -> dict[str, Any]:
        """Numbers since the last reading, evaluation and saving left out; what the device was given must be done.

        Args:
            step: completed ones; `plan`: what they read.
        """
        tokens_by_length: dict[int, int] = {}
        for made in range(self._step, step):
            length = plan.sequence_length(made)
            tokens_by_length[length] = tokens_by_length.get(length, 0) + plan.num_tokens(made)
        self._step = step
        now = self._clock()
        found = self._phases.read()
        apart = sum(found.get(name, 0.0) for name in _APART)
        seconds = max(1e-9, now - self._read_at - apart)
        self._read_at = now
        num_tokens = sum(tokens_by_length.values())
        by_phase = {name.replace(" ", "_"): round(found.get(name, 0.0), 6) for name in STEP_PHASES}
        overhead = max(0.0, seconds - sum(found.get(name, 0.0) for name in STEP_PHASES))
        return {
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "data_wait_ratio": found.get(named.DATA, 0.0) / seconds,
            "mfu": self._utilisation(tokens_by_length, seconds),
            "memory_bytes": self._memory_bytes(),
            "phase_seconds": by_phase | {"overhead": round(overhead, 6)},
            "save_pause_seconds": round(found.get(named.SAVE, 0.0), 6),
        }

    def _utilisation(self, tokens_by_length: dict[int, int], seconds: float) -> float | None:
        """Model FLOPs / peak; None where the device or the model is not known by a formula."""
        if self._peak is None or self._per_token is None:
            return None
        done = sum(self._per_token[length] * count for length, count in tokens_by_length.items())
        return done / seconds / self._peak

    def _memory_bytes(self) -> int:
        """The most that the device held since the last reading; without one, what this process holds now."""
        if self._device.type != "cuda":
            return int(self._process.memory_info().rss)
        found = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return found


def flops_per_token(recipe: Recipe, vocab_size: int) -> dict[int, int] | None:
    """Floating-point operations per token of sequences of each length of the run; None where no formula is known."""
    model, _ = stand_in(recipe.model)
    if not flops.has_formula(model):
        return None
    return {
        length: flops.trained_flops_per_token(
            model,
            recipe.objective,
            vocab_size=vocab_size,
            sequence_length=length,
            target_ratio=target_ratio(recipe.objective),
        )
        for length in recipe.batches.tokens_by_length()
    }
