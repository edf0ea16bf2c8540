"""Which checkpoints a run keeps, and the removal of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmssl.checkpoint.folder import read_manifest, remove, step_folders, step_of


@dataclass(frozen=True)
class Keep:
    """The policies of the section `checkpoint`."""

    last: int
    """The newest so many."""
    every_steps: int | None = None
    """Those of multiples of this step, for ever."""
    best: int | None = None
    """The so many of lowest validation loss."""

    def most(self, num_steps: int) -> int:
        """How many checkpoints a run of so many steps ends up with, at most, all policies naming different ones."""
        return self.last + (num_steps // self.every_steps if self.every_steps else 0) + (self.best or 0)


@dataclass(frozen=True)
class Known:
    """What the manifest of a whole checkpoint says."""

    step: int
    finite: bool = True
    """Whether the losses before it were numbers; its weights always are."""
    loss: float | None = None
    """On the validation split, at this step; None: not measured, or not finite."""


def kept_steps(found: Sequence[Known], keep: Keep) -> set[int]:
    """Steps whose checkpoints stay: those of each policy, and the newest before which losses were finite.

    >>> found = [Known(10, loss=3.0), Known(20, loss=4.0), Known(30), Known(40, finite=False)]
    >>> sorted(kept_steps(found, Keep(last=1, best=1)))
    [10, 30, 40]
    """
    newest_first = sorted(found, key=lambda known: -known.step)
    stay = {known.step for known in newest_first[: keep.last]}
    stay |= {known.step for known in newest_first if known.finite and known.step == _last_finite(newest_first)}
    if keep.every_steps is not None:
        stay |= {known.step for known in found if known.step % keep.every_steps == 0}
    if keep.best is not None:
        measured = [known for known in newest_first if known.loss is not None]
        measured.sort(key=lambda known: math.inf if known.loss is None else known.loss)
        stay |= {known.step for known in measured[: keep.best]}
    return stay


def _last_finite(newest_first: Sequence[Known]) -> int | None:
    return next((known.step for known in newest_first if known.finite), None)


def prune(run: Path, keep: Keep, *, verified_step: int, report: Callable[[str], None]) -> list[int]:
    """Remove the checkpoints that no policy keeps; returns their steps.

    Later ones than the verified one are left to be written anew, and folders that cannot be read to `lmssl verify`;
    neither counts as kept, so what a policy keeps is usable.

    Args:
        verified_step: of a checkpoint that was just read back; it always stays.
    """
    paths = [path for path in step_folders(run) if step_of(path) <= verified_step]
    known = {path: found for path in paths if (found := known_of(path)) is not None}
    stay = kept_steps(list(known.values()), keep) | {verified_step}
    removed = []
    for path, found in known.items():
        if found.step not in stay:
            try:
                remove(path)
                removed.append(found.step)
            except OSError as error:
                report(f"checkpoint {path.name} cannot be removed, training goes on: {error}")
    return removed


def known_of(path: Path) -> Known | None:
    """What the policies ask of a checkpoint; None where manifest or sizes are wrong. Reads no tensors."""
    try:
        manifest = read_manifest(path)
    except OSError:
        return None
    if isinstance(manifest, str):
        return None
    return Known(step_of(path), bool(manifest.get("finite", True)), manifest.get("validation_loss"))
