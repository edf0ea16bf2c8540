"""One optimiser step, top to bottom, in the two shapes an objective can have.

Nothing here depends on the objective or the backend: the prepared module's forward computes the loss, counts are
global before the first backward, and the update happens on the device only if every number is finite.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmssl.objective.base import EmbeddingObjective, MicroBatch, Objective, SumObjective
from lmssl.optim.groups import set_rates
from lmssl.train.agree import Agreement
from lmssl.train.backend import Backend
from lmssl.train.guard import Limits
from lmssl.train.phases import COMPUTE, COUNTS, EXCHANGE, UPDATE, Phases

_PARTS_OF_BYTES = 1024
"""Bytes of cut documents and of masked text are fractions; each rank sends whole numbers of such parts."""


@dataclass(frozen=True)
class Measured:
    """What a step measured, as tensors that the log reads later."""

    sums: dict[str, Tensor]
    """Summed loss of each term, and sum of each metric, over the whole batch, float32."""
    counts: dict[str, Tensor]
    """Targets of each term and metric over the whole batch, int64."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    finite: Tensor
    """1.0 if the update was made."""
    loss: Tensor
    """What was trained: the weighted means of all terms, float32."""
    num_bytes: Tensor
    """Bytes of text in the whole batch, float64."""
    num_padding_tokens: Tensor
    """Tokens of the whole batch that hold no text, int64."""
    overflow: Tensor | None = None
    """1.0 if gradients overflowed in float16, and nothing else was wrong; None: they are not scaled."""
    copied: torch.cuda.Event | None = None
    """When the numbers are there, in the queue of the device that made them; None: they are."""

    def wait(self) -> None:
        """Wait for the numbers, and for nothing that the device was given after them."""
        if self.copied is not None:
            self.copied.synchronize()

    def on_host(self) -> Measured:
        """The same, on their way to the host where a GPU has them.

        `item()` would queue its copy behind the next step and wait for that, too.
        """
        if self.loss.device.type != "cuda":
            return self
        found = [*self.sums.values(), *self.counts.values(), self.grad_norm, self.finite, self.loss]
        found += [self.num_bytes, self.num_padding_tokens]
        found += [] if self.overflow is None else [self.overflow]
        made = torch.stack([value.detach().double() for value in found])
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        numbers = iter(host.unbind())
        sums = {name: next(numbers) for name in self.sums}
        counts = {name: next(numbers) for name in self.counts}
        norm, finite, loss, num_bytes, num_padding, *overflow = numbers
        found_overflow = overflow[0] if overflow else None
        return Measured(sums, counts, norm, finite, loss, num_bytes, num_padding, found_overflow, copied)


def train_step(
    backend: Backend,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    lr_ratio: float,
    max_grad_norm: float | None,
    momentum: float | None = None,
    seed: int,
    step: int,
    agreement: Agreement,
    phases: Phases,
    limits: Limits | None = None,
) -> Measured | None:
    """One update from this rank's micro-batches of one batch; None: the ranks agreed to stop, and nothing is updated.

    Args:
        backend: the wrapped module, its optimiser, and the averages that follow the update.
        lr_ratio: learning rates of this step / those of the parameter groups at their peak.
        momentum: of this step, for groups that have one; None: what they have.
        seed, step: key the random state of every forward (dropout), so that none has to be saved.
        agreement: asked before the step and before each micro-batch.
        phases: told what is being done.
        limits: of loss and gradient norm, beyond which the update is not made; None: whatever is finite.
    """
    phases.enter(COUNTS)
    agreement.poll()  # a wish of any rank is known to all at the first micro-batch at the latest
    totals = _global_totals(backend, micro_batches)
    go_on = _Going(agreement, phases)
    if isinstance(objective, EmbeddingObjective):
        found = _embedding_backward(backend, objective, micro_batches, seed, step, go_on)
    else:
        counts = dict(zip(micro_batches[0].counts, totals, strict=False))
        found = _sum_backward(backend, objective, counts, micro_batches, seed, step, go_on)
    if found is None:
        backend.drop_gradients()
        return None
    sums, counts = found
    loss = _trained_loss(objective, sums, counts)
    phases.enter(UPDATE)
    backend.unscale()
    grad_norm = backend.clip(max_grad_norm)
    finite = torch.isfinite(torch.stack([*(s.float() for s in sums.values()), grad_norm.float()])).all().float()
    if limits is not None:
        finite = finite * (loss <= limits.loss) * (grad_norm <= limits.grad_norm)
    set_rates(backend.optimizer.param_groups, ratio=lr_ratio, momentum=momentum)
    finite = backend.update(finite)
    overflow = None
    if backend.loss_scale is not None:
        overflow = backend.loss_scale.overflowed(sums, grad_norm)
        backend.loss_scale.follow(overflow, finite)
    if backend.average is not None:
        backend.average.update(finite, step=step)
    num_bytes, num_padding = totals[-2].double() / _PARTS_OF_BYTES, totals[-1]
    return Measured(sums, counts, grad_norm, finite, loss, num_bytes, num_padding, overflow).on_host()


@dataclass(frozen=True)
class _Going:
    """Asked before each micro-batch."""

    agreement: Agreement
    phases: Phases

    def on(self, micro_batch: int) -> bool:
        """Whether the ranks have not agreed to stop."""
        self.phases.enter(COMPUTE, f"forward of micro-batch {micro_batch}")
        return not self.agreement.poll()

    def back(self, micro_batch: int, *, last: bool) -> None:
        """Its backward begins; the last one exchanges gradients."""
        exchange = " and exchange of gradients" if last else ""
        self.phases.enter(COMPUTE, f"backward{exchange} of micro-batch {micro_batch}")


def _trained_loss(objective: Objective, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> Tensor:
    weights = {"loss": 1.0} if isinstance(objective, EmbeddingObjective) else objective.weights
    parts = [weight * sums[term].float() / counts[term].clamp(min=1) for term, weight in weights.items()]
    return torch.stack(parts).sum()


def _global_totals(backend: Backend, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Counts of every term, then bytes and padding tokens, summed over all ranks: one small vector."""
    terms = list(micro_batches[0].counts)
    local = [sum(m.counts[term] for m in micro_batches) for term in terms]
    local += [round(sum(m.num_bytes for m in micro_batches) * _PARTS_OF_BYTES)]
    local += [sum(m.num_padding_tokens for m in micro_batches)]
    found, device = torch.tensor(local, dtype=torch.int64), backend.accelerator.device
    if device.type == "cuda":  # from other memory a copy waits for all that the device was given
        found = found.pin_memory()
    return backend.reduce(found.to(device, non_blocking=True))


def _sum_backward(
    backend: Backend,
    objective: SumObjective,
    counts: dict[str, Tensor],
    micro_batches: Sequence[MicroBatch],
    seed: int,
    step: int,
    go_on: _Going,
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Gradients of `sum_k weight_k * sum_k / count_k` with global counts.

    Returns the global sums, metrics included, and the counts; None: the ranks agreed to stop.
    """
    names = (*objective.weights, *objective.metrics)
    device, rank = backend.accelerator.device, backend.accelerator.process_index
    totals = {name: torch.zeros((), device=device) for name in names}
    for index, micro in enumerate(micro_batches):
        if not go_on.on(index):
            return None
        _seed_forward(seed, step, index, rank)
        last = index == len(micro_batches) - 1  # gradients are exchanged once a step
        sums = backend.forward(micro.on(device), last=last)
        parts = [weight * sums[term] / counts[term].clamp(min=1) for term, weight in objective.weights.items()]
        go_on.back(index, last=last)
        backend.backward(backend.scaled(torch.stack(parts).sum()), last=last)
        totals = {name: totals[name] + sums[name].detach() for name in names}
    go_on.phases.enter(EXCHANGE)
    stacked = backend.reduce(torch.stack(list(totals.values())))
    return dict(zip(totals, stacked.unbind(), strict=True)), counts


def _embedding_backward(
    backend: Backend,
    objective: EmbeddingObjective,
    micro_batches: Sequence[MicroBatch],
    seed: int,
    step: int,
    go_on: _Going,
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Gradients of a loss over all embeddings, with the memory of one micro-batch.

    Source: GradCache (Gao et al. 2021); differs in replaying dropout by seeds keyed on the micro-batch.
    """
    accelerator = backend.accelerator
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    inputs = [micro.on(device) for micro in micro_batches]
    rows = []
    with torch.no_grad():
        for index, part in enumerate(inputs):
            if not go_on.on(index):
                return None
            _seed_forward(seed, step, index, rank)
            rows.append(backend.forward(part, last=False)["embeddings"].float())
    # gather gives [micro-batch 0 of all ranks, ...]; positions run micro-batch by micro-batch, rank by rank.
    go_on.phases.enter(EXCHANGE)
    gathered = [backend.gather(part) for part in rows]
    everything = torch.cat(gathered).detach().requires_grad_()
    loss = objective.loss(everything)
    (gradient,) = torch.autograd.grad(loss, everything)
    start = 0
    for index, part in enumerate(inputs):
        if not go_on.on(index):
            return None
        size = rows[index].shape[0]
        mine = gradient[start + rank * size : start + (rank + 1) * size]
        start += size * ranks
        _seed_forward(seed, step, index, rank)
        last = index == len(inputs) - 1
        embeddings = backend.forward(part, last=last)["embeddings"].float()
        go_on.back(index, last=last)
        backend.backward(backend.scaled((embeddings * mine).sum()), last=last)
    count = torch.ones((), dtype=torch.int64, device=device)
    return {"loss": loss.detach()}, {"loss": count}


def _seed_forward(seed: int, step: int, micro_batch: int, rank: int) -> None:
    torch.manual_seed(zlib.crc32(f"{seed}/{step}/{micro_batch}/{rank}".encode()))
