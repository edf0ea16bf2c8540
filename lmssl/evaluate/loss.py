"""Exact loss and bits per byte on held-out sequences: sums first, one division at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from lmssl.objective.base import MicroBatch, SumObjective


@dataclass(frozen=True)
class LossResult:
    """Sums over the held-out text of one corpus, or of all."""

    nats: float
    """Summed loss of the objective's first term."""
    num_targets: int
    num_bytes: float
    """Of the text; 0: not known, as for corpora of ready-made tokens."""
    further: dict[str, float | None] = field(default_factory=dict)
    """Means of the objective's other terms, as `loss_<term>`, and of its metrics; None as for `loss`."""

    @property
    def loss(self) -> float | None:
        """Nats per target; None where there is no target, or the loss is not finite."""
        return mean(self.nats, self.num_targets)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text; end-of-document targets are paid for, unpredicted first tokens are free.

        None where the bytes are not known, and as for `loss`.
        """
        return mean(self.nats / math.log(2), self.num_bytes) if self.num_targets else None


def mean(total: float, count: float) -> float | None:
    """`total / count`, or None where that is no number: neither people nor JSON should read NaN.

    >>> mean(3.0, 2), mean(0.0, 0), mean(math.nan, 2)
    (1.5, None, None)
    """
    return total / count if count and math.isfinite(total) else None


def evaluate_loss(
    module: nn.Module,
    objective: SumObjective,
    splits: Mapping[str, Iterable[MicroBatch]],
    accelerator: Accelerator,
    *,
    apart: Collection[str] = (),
    go_on: Callable[[], bool] = lambda: True,
) -> dict[str, LossResult] | None:
    """Loss of every corpus and, under `""`, of all together; the same for any batch size and number of processes.

    Args:
        module: a `LossModule`, or what wraps one; it is left in the mode it came in.
        splits: this rank's micro-batches by corpus, equally many on every rank.
        apart: those that do not count in the loss of all together.
        go_on: asked before each micro-batch, and must answer the same on every rank; after a no the result is None.
    """
    names = (*objective.weights, *objective.metrics)
    sums: dict[str, torch.Tensor] = {}
    was_training = module.training
    module.eval()
    try:
        # Compiling a second graph for a few batches would cost more than it saves.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for corpus, batches in splits.items():
                sums[corpus] = torch.zeros(2 * len(names) + 1, dtype=torch.float64)
                for micro in batches:
                    if not go_on():
                        return None
                    found = module(micro.on(accelerator.device))
                    of_names = [value for name in names for value in (float(found[name]), micro.counts[name])]
                    sums[corpus] += torch.tensor([*of_names, micro.num_bytes], dtype=torch.float64)
    finally:
        module.train(was_training)
    rows = accelerator.reduce(torch.stack(list(sums.values())).to(accelerator.device), "sum").cpu()
    results = {corpus: _result(objective, row) for corpus, row in zip(sums, rows, strict=True)}
    counted = [corpus not in apart for corpus in sums]
    whole = rows[counted].sum(0)
    inside = [results[corpus] for corpus in sums if corpus not in apart]
    if any(result.num_targets and not result.num_bytes for result in inside):
        whole[-1] = 0.0  # a part of the bytes would flatter nobody and mislead everybody
    return {"": _result(objective, whole), **results}


def _result(objective: SumObjective, row: torch.Tensor) -> LossResult:
    nats, num_targets, *others, num_bytes = row.tolist()
    labels = [f"loss_{term}" for term in list(objective.weights)[1:]] + list(objective.metrics)
    means = zip(labels, others[::2], others[1::2], strict=True)
    further = {label: mean(total, count) for label, total, count in means}
    return LossResult(nats, round(num_targets), num_bytes, further)
