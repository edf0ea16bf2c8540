"""Saving as a run does it: by which group ranks meet, what manifests say, whether the disk will hold it."""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmssl import __version__, checkpoint
from lmssl.errors import CheckpointError, TrainingError
from lmssl.recipe.load import resolved_yaml
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.load import Tokenizer
from lmssl.train.backend import Backend
from lmssl.train.console import Report
from lmssl.train.zero import Zero

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for the slowest disk; a rank that dies is noticed at once."""


class GlooMeeting:
    """Ranks exchange texts by a group of their own, which a thread may use while training uses the others."""

    def __init__(self, num_ranks: int) -> None:
        """Every rank must make one."""
        self._num_ranks = num_ranks
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, by rank.

        Raises:
            OSError: a rank is gone.
        """
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._num_ranks)]
        try:
            dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
            room = max(int(size) for size in sizes)
            padded = torch.zeros(room, dtype=torch.uint8)
            padded[: data.numel()] = data
            found = [torch.empty(room, dtype=torch.uint8) for _ in range(self._num_ranks)]
            dist.all_gather(found, padded, group=self._group)
        except RuntimeError as error:  # gloo's only kind
            raise ConnectionError(f"ranks could not exchange what they saved: {str(error).splitlines()[0]}") from error
        return [bytes(row[: int(size)].tolist()).decode() for row, size in zip(found, sizes, strict=True)]


def open_saver(
    run: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    backend: Backend,
    report: Report,
    *,
    step: int,
    begun_with: str | None,
) -> checkpoint.Saver:
    """What saves the checkpoints of a run; every rank must call.

    Args:
        step: at which the run goes on.
        begun_with: the model that it has begun with in this session; None: it has not.

    Raises:
        CheckpointError: the disk does not hold one checkpoint, or ranks go on from different ones.
        TrainingError: ranks compute in different precisions.
    """
    accelerator, section = backend.accelerator, recipe.checkpoint
    keep = checkpoint.Keep(section.keep_last, section.keep_every_steps, section.keep_best)
    num_ranks = accelerator.num_processes
    meeting = GlooMeeting(num_ranks) if num_ranks > 1 else None
    if meeting is not None:
        require_one_step(meeting, step, run)
        require_one_source(meeting, begun_with)
        require_one_precision(meeting, recipe.train.precision)
    saver = checkpoint.Saver(
        run,
        keep=keep,
        clock=time.monotonic,
        report=report,
        asynchronous=section.asynchronous,
        rank=accelerator.process_index,
        num_ranks=num_ranks,
        group=meeting,
        about={
            "backend": backend.name,
            "recipe": hashlib.sha256(resolved_yaml(recipe).encode()).hexdigest(),
            "tokenizer": tokenizer.fingerprint,
            "versions": {"lmssl": __version__}
            | {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")},
        },
    )
    if section.asynchronous and isinstance(backend, Zero):
        report("under ZeRO a save gathers every tensor while training waits; only writing it is in the background")
    if accelerator.is_main_process and step < recipe.steps:
        # Weights and two states of each, in float32; other optimisers have less.
        num_tensors = 3 + (recipe.train.ema_decay is not None)
        num_bytes = num_tensors * 4 * backend.num_parameters
        checkpoint.check_space(run, num_bytes, num_checkpoints=keep.most(recipe.steps) + 1, report=report)
    return saver


def require_one_step(meeting: checkpoint.Meeting, step: int, run: Path) -> None:
    """Refuse to train where ranks found different checkpoints, each for itself.

    Raises:
        CheckpointError: names the steps.
    """
    steps = meeting.exchange(str(step))
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
        raise CheckpointError(
            f"ranks go on from different steps ({found})",
            where=str(run),
            remedy="all processes must see one run folder, on one shared file system",
        )


def require_one_source(meeting: checkpoint.Meeting, begun_with: str | None) -> None:
    """Refuse to train where ranks began with different models, as the newest of a run that goes on.

    Raises:
        CheckpointError: names two of them.
    """
    different = _different(meeting, begun_with or "")
    if different is not None:
        raise CheckpointError(
            f"ranks begin with different models ({different})",
            where="model.from",
            remedy="name one of them: model.from=RUN/checkpoints/step-N",
        )


def require_one_precision(meeting: checkpoint.Meeting, precision: str) -> None:
    """Refuse to train where ranks round products differently, as `auto` would on nodes of two kinds.

    A launcher with a store lets rank 0 choose for all; Slurm's `srun` has none.

    Raises:
        TrainingError: names two of them.
    """
    different = _different(meeting, precision)
    if different is not None:
        raise TrainingError(
            f"ranks compute in different precisions ({different})",
            where="train.precision",
            remedy="name one that all of these machines have: train.precision=fp32, or bf16",
        )


def _different(meeting: checkpoint.Meeting, said: str) -> str | None:
    """Two ranks that say different things, in words."""
    answers = meeting.exchange(said)
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            return f"rank 0: {answers[0]}, rank {rank}: {answer}"
    return None
