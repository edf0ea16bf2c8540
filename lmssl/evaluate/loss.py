"""Exact loss and bits per byte on held-out sequences: sums first, one division at the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lmssl.objective.base import MicroBatch, SumObjective
from lmssl.objective.module import LossModule


@dataclass(frozen=True)
class LossResult:
    """Sums over the held-out text of one corpus, or of all."""

    nats: float
    """Summed loss of the objective's first term."""
    num_targets: int
    num_bytes: float
    """Of the text; 0: not known, as for corpora of ready-made tokens."""

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.num_targets if self.num_targets else math.nan

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text; end-of-document targets are paid for, unpredicted first tokens are free.

        None where the bytes are not known.
        """
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


def evaluate_loss(
    module: LossModule,
    objective: SumObjective,
    splits: Mapping[str, Iterable[MicroBatch]],
    accelerator: Accelerator,
    *,
    apart: Collection[str] = (),
) -> dict[str, LossResult]:
    """Loss of every corpus and, under `""`, of all together; the same for any batch size and number of processes.

    Args:
        module: the unwrapped module; it is left in the mode it came in.
        splits: this rank's micro-batches by corpus, equally many on every rank.
        apart: those that do not count in the loss of all together.
    """
    term = next(iter(objective.weights))
    sums: dict[str, torch.Tensor] = {}
    was_training = module.training
    module.eval()
    try:
        # Compiling a second graph for a few batches would cost more than it saves.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for corpus, batches in splits.items():
                sums[corpus] = torch.zeros(3, dtype=torch.float64)
                for micro in batches:
                    inputs = {name: tensor.to(accelerator.device) for name, tensor in micro.inputs.items()}
                    nats = module(inputs)[term].double().cpu()
                    sums[corpus] += torch.tensor(
                        [float(nats), micro.counts[term], micro.num_bytes], dtype=torch.float64
                    )
    finally:
        module.train(was_training)
    names = list(sums)
    stacked = torch.stack([sums[name] for name in names]).to(accelerator.device)
    rows = accelerator.reduce(stacked, "sum").cpu()
    found = {name: _result(row) for name, row in zip(names, rows, strict=True)}
    counted = [number for number, name in enumerate(names) if name not in apart]
    whole = rows[counted].sum(0)
    if any(found[names[number]].num_targets and not found[names[number]].num_bytes for number in counted):
        whole[2] = 0.0  # a part of the bytes would flatter nobody and mislead everybody
    return {"": _result(whole), **found}


def _result(row: torch.Tensor) -> LossResult:
    nats, num_targets, num_bytes = row.tolist()
    return LossResult(nats, round(num_targets), num_bytes)
