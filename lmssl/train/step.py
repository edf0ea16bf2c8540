"""One optimiser step, top to bottom, in the two shapes an objective can have.

Nothing here depends on the objective or the backend: the prepared module's forward computes the loss, counts are
global before the first backward, and the update happens on the device only if every number is finite.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lmssl.objective.base import EmbeddingObjective, MicroBatch, Objective, SumObjective
from lmssl.optim.ema import WeightAverage

_PARTS_OF_BYTES = 1024
"""Bytes of cut documents and of masked text are fractions; each rank sends whole numbers of such parts."""


@dataclass(frozen=True)
class Measured:
    """What a step measured; tensors stay on the device until the log reads them."""

    sums: dict[str, Tensor]
    """Summed loss of each term, and sum of each metric, over the whole batch, float32."""
    counts: dict[str, Tensor]
    """Targets of each term and metric over the whole batch, int64."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    finite: Tensor
    """1.0 if the update was made."""
    num_bytes: Tensor
    """Bytes of text in the whole batch, float64."""
    num_padding_tokens: Tensor
    """Tokens of the whole batch that hold no text, int64."""
    stop: Tensor
    """How many ranks were asked to stop."""


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    *,
    average: WeightAverage | None = None,
    lr: float,
    max_grad_norm: float | None,
    seed: int,
    step: int,
    stop_requested: bool,
) -> Measured:
    """One update from this rank's micro-batches of one batch.

    Args:
        module: the prepared `LossModule`.
        average: of its weights, which follows the update; None: there is none.
        lr: learning rate of this step.
        seed, step: key the random state of every forward (dropout), so that none has to be saved.
        stop_requested: whether this rank received a signal; summed over ranks with the counts.
    """
    totals = _global_totals(micro_batches, accelerator, stop_requested)
    if isinstance(objective, EmbeddingObjective):
        sums, counts = _embedding_backward(module, objective, micro_batches, accelerator, seed, step)
    else:
        counts = dict(zip(micro_batches[0].counts, totals, strict=False))
        sums = _sum_backward(module, objective, counts, micro_batches, accelerator, seed, step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    finite = torch.isfinite(torch.stack([*(s.float() for s in sums.values()), grad_norm.float()])).all().float()
    _update(optimizer, lr, finite)
    if average is not None:
        average.update(finite, step=step)
    num_bytes, num_padding, stop = totals[-3].double() / _PARTS_OF_BYTES, totals[-2], totals[-1]
    return Measured(sums, counts, grad_norm, finite, num_bytes, num_padding, stop)


def _global_totals(micro_batches: Sequence[MicroBatch], accelerator: Accelerator, stop_requested: bool) -> Tensor:
    """Counts of every term, then bytes, padding tokens and stop requests, summed over all ranks: one small vector."""
    terms = list(micro_batches[0].counts)
    local = [sum(m.counts[term] for m in micro_batches) for term in terms]
    local += [round(sum(m.num_bytes for m in micro_batches) * _PARTS_OF_BYTES)]
    local += [sum(m.num_padding_tokens for m in micro_batches), int(stop_requested)]
    totals = torch.tensor(local, dtype=torch.int64).to(accelerator.device)
    reduced: Tensor = accelerator.reduce(totals, "sum")
    return reduced


def _sum_backward(
    module: nn.Module,
    objective: SumObjective,
    counts: dict[str, Tensor],
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """Gradients of `sum_k weight_k * sum_k / count_k` with global counts; returns the global sums, metrics included."""
    names = (*objective.weights, *objective.metrics)
    totals = {name: torch.zeros((), device=accelerator.device) for name in names}
    for index, micro in enumerate(micro_batches):
        _seed_forward(seed, step, index, accelerator.process_index)
        inputs = _moved(micro, accelerator.device)
        last = index == len(micro_batches) - 1
        with _synced(accelerator, module, last):
            sums = module(inputs)
            parts = [weight * sums[term] / counts[term].clamp(min=1) for term, weight in objective.weights.items()]
            # DDP averages gradients over ranks; ours are parts of one global mean, so they must add up.
            accelerator.backward(torch.stack(parts).sum() * accelerator.num_processes)
        totals = {name: totals[name] + sums[name].detach() for name in names}
    stacked: Tensor = accelerator.reduce(torch.stack(list(totals.values())), "sum")
    return dict(zip(totals, stacked.unbind(), strict=True))


def _embedding_backward(
    module: nn.Module,
    objective: EmbeddingObjective,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    seed: int,
    step: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a loss over all embeddings, with the memory of one micro-batch.

    Source: GradCache (Gao et al. 2021); differs in replaying dropout by seeds keyed on the micro-batch.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    inputs = [_moved(micro, accelerator.device) for micro in micro_batches]
    rows = []
    with torch.no_grad():
        for index, part in enumerate(inputs):
            _seed_forward(seed, step, index, rank)
            rows.append(module(part)["embeddings"].float())
    # gather gives [micro-batch 0 of all ranks, ...]; positions run micro-batch by micro-batch, rank by rank.
    gathered = [accelerator.gather(part) for part in rows]
    everything = torch.cat(gathered).detach().requires_grad_()
    loss = objective.loss(everything)
    (gradient,) = torch.autograd.grad(loss, everything)
    start = 0
    for index, part in enumerate(inputs):
        size = rows[index].shape[0]
        mine = gradient[start + rank * size : start + (rank + 1) * size]
        start += size * ranks
        _seed_forward(seed, step, index, rank)
        with _synced(accelerator, module, index == len(inputs) - 1):
            embeddings = module(part)["embeddings"].float()
            accelerator.backward((embeddings * mine).sum() * ranks)
    count = torch.ones((), dtype=torch.int64, device=accelerator.device)
    return {"loss": loss.detach()}, {"loss": count}


def _update(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor) -> None:
    """The gated update: the fused kernel leaves weights, moments and step count alone when `found_inf` is set."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]  # read by the fused kernel; GradScaler sets it so
    optimizer.step()
    optimizer.zero_grad()


def _seed_forward(seed: int, step: int, micro_batch: int, rank: int) -> None:
    torch.manual_seed(zlib.crc32(f"{seed}/{step}/{micro_batch}/{rank}".encode()))


def _moved(micro: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in micro.inputs.items()}


def _synced(accelerator: Accelerator, module: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients are exchanged once a step, with the last micro-batch."""
    return nullcontext() if last else accelerator.no_sync(module)
