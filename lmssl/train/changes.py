"""What of a recipe may change while its run goes on, and from which checkpoint it then continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint
from lmssl.errors import CheckpointError
from lmssl.optim.schedule import lr_ratio, spent_ratio
from lmssl.recipe.load import difference, load_recipe
from lmssl.recipe.objective import Masks
from lmssl.recipe.schedule import WsdSchedule
from lmssl.recipe.sections import Recipe
from lmssl.train.console import Report
from lmssl.train.state import TrainState

FREE_FIELDS = (
    *("name", "out", "checkpoint", "evaluate", "track", "card", "data.workers", "data.cache"),
    *("data.remote_cache_bytes", "data.max_bad_records", "data.skip", "data.stages", "data.validation.sets"),
    *("train.compile", "train.kernels", "train.micro_batch_sequences", "train.log_every_steps", "guard"),
    *("train.max_skipped_steps", "train.activation_checkpointing", "train.deterministic", "train.hang_seconds"),
)
"""Fields that may differ when a run continues: they move neither the order of data nor the update.

What a changed `data.skip` or `data.stages` says of positions that are already read is compared with the checkpoint.
"""

LENGTH_FIELDS = ("train.tokens", "train.max_hours", "schedule")
"""Fields that may differ where no completed step would have had another learning rate."""

_LOOKS = 4096
"""At learning rates of a long run, where two schedules are compared."""

_CONSEQUENCES = (
    ("data", "it decides which tokens a position holds; what lies ahead can change by data.stages"),
    ("tokenizer", "every id would mean another text; a new run can begin with these weights: model.from"),
    ("model", "the weights would have other names, shapes or meanings; a new run can begin with them: model.from"),
    ("objective", "the loss would be another one; a new run can begin with these weights: model.from"),
    ("optim", "the updates made so far belong to the old value; a new run can begin with these weights: model.from"),
    ("train.batch", "it decides which positions a step reads; begin a new run with model.from"),
    ("train.precision", "every product would be rounded otherwise; begin a new run with model.from"),
    ("train.ema_decay", "the average so far has the old weights; begin a new run with model.from"),
    ("train", "the steps so far belong to the old value; begin a new run with model.from"),
    ("seed", "dropout and the order of data follow it; choose another out for another seed"),
    ("schedule", "completed steps had other learning rates"),
)
"""What a field means for the steps that are made, by the beginning of its path."""


@dataclass(frozen=True)
class Continuation:
    """Where a run goes on."""

    found: Checkpoint | None
    """None: at its beginning."""
    passed: tuple[Path, ...] = ()
    """Newer checkpoints, whose last steps the recipe would have made otherwise."""


def check_fields(run: Path, recipe: Recipe) -> None:
    """Compare a recipe with the one that a run folder was made by.

    Raises:
        CheckpointError: a field differs that must not; shows every such field, and what it means.
    """
    earlier = run / "recipe.yaml"
    changed = [
        (path, old, new)
        for path, old, new in difference(load_recipe(earlier).recipe, recipe)
        if not under(path, (*FREE_FIELDS, *LENGTH_FIELDS))
    ]
    if changed:
        raise CheckpointError(
            f"the run in {run} was made by another recipe:{''.join(_explained(changed))}",
            where=str(earlier),
            remedy="undo these changes to continue it, or choose another out for a new run",
        )


def find_continuation(run: Path, recipe: Recipe, report: Report) -> Continuation:
    """The newest valid checkpoint that the recipe would have made.

    Raises:
        CheckpointError: there are checkpoints, and completed steps of all of them had other learning rates.
    """
    newest = checkpoint.find_latest(run, report)
    if newest is None:
        return Continuation(None)
    passed: list[Path] = []
    found: Checkpoint | None = newest
    while found is not None:
        old = load_recipe(found.path / "recipe.yaml").recipe
        if same_history(old, recipe, found):
            for line in _about_lengths(old, recipe, found.step):
                report(line)
            if passed:
                report(f"checkpoints of later steps are kept in {_ended(run, newest.step)}")
            return Continuation(found, tuple(passed))
        passed.append(found.path)
        found = _before(run, found.step)
    raise _other_rates(load_recipe(newest.path / "recipe.yaml").recipe, recipe, newest)


def set_passed_aside(run: Path, passed: tuple[Path, ...]) -> None:
    """Move checkpoints that are not continued from into a run folder of their own, with copies of what explains them.

    The steps after the one that is continued from leave metrics.jsonl when the run goes on; the copy keeps them.
    """
    if not passed:
        return
    steps = sorted(passed)
    folder = _ended(run, int(steps[-1].name.removeprefix("step-")))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        if (run / name).exists() and not (folder / name).exists():
            shutil.copyfile(run / name, folder / f".tmp-{name}")
            (folder / f".tmp-{name}").rename(folder / name)
    if not (folder / "tokenizer").exists():
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
    for path in reversed(steps):  # the newest first: what is left is continued from in the same way
        path.rename(folder / "checkpoints" / path.name)


def _ended(run: Path, step: int) -> Path:
    """A folder for the checkpoints up to one, which has none of that step yet."""
    names = (f"ended-at-step-{step:08d}" + (f"-{number}" if number > 1 else "") for number in count(1))
    return next(run / name for name in names if not (run / name / "checkpoints" / f"step-{step:08d}").exists())


def under(path: str, fields: tuple[str, ...]) -> bool:
    """Whether a path is one of some fields, or in one of them."""
    return any(path == field or path.startswith(field + ".") for field in fields)


def _explained(changed: list[tuple[str, Any, Any]]) -> Iterator[str]:
    for path, old, new in changed[:8]:
        yield f"\n    {path}: {old!r} there, {new!r} now"
        why = next((why for field, why in _CONSEQUENCES if path.startswith(field)), None)
        if why is not None:
            yield f"\n        {why}"
    if len(changed) > 8:
        yield f"\n    and {len(changed) - 8} more"


def _before(run: Path, step: int) -> Checkpoint | None:
    """The newest valid checkpoint before a step."""
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.step_folders(run)]
    for number in sorted((n for n in steps if n < step), reverse=True):
        with suppress(CheckpointError):  # one that is damaged
            return checkpoint.find_step(run, number)
    return None


def same_history(old: Recipe, new: Recipe, found: Checkpoint) -> bool:
    """Whether both recipes give the steps before a checkpoint the same learning rates and rates of masks."""
    steps = found.step
    if not _same_masks(old, new, steps):
        return False
    if all(not under(path, LENGTH_FIELDS) for path, _, _ in difference(old, new)):
        return True
    if steps > new.steps or _first_other_step(old, new, steps) is not None:
        return False
    if old.train.max_hours is None and new.train.max_hours is None:
        return True
    # When each step was made is not known, but what time does to a rate it does until the end.
    return rate_at(old, found) == rate_at(new, found)


def rate_at(recipe: Recipe, found: Checkpoint) -> float:
    """The share of the peak that the step after a checkpoint has under a recipe, by tokens and by the hours spent."""
    spent = spent_ratio(TrainState.from_json(found.text("state.json")).elapsed_seconds, recipe.train.max_hours)
    return _ratio(recipe, recipe.batches.tokens_before(found.step), spent)


def _first_other_step(old: Recipe, new: Recipe, steps: int) -> int | None:
    tokens_before = old.batches.tokens_before
    return _first(range(steps), lambda step: _ratio(old, tokens_before(step)) != _ratio(new, tokens_before(step)))


def _first(steps: range, holds: Callable[[int], bool]) -> int | None:
    """The first step at which something holds that began at the first step or goes on to the last, if any.

    So do differences of schedules: in their warmups from the start, in what follows to the end. A million steps are
    not all looked at.
    """
    stride = max(1, len(steps) // _LOOKS)
    before = steps.start
    for looked in sorted({*steps[:stride], *steps[::stride], *steps[-1:]}):
        if holds(looked):
            return next(step for step in range(before, looked + 1) if holds(step))
        before = looked + 1
    return None


def _ratio(recipe: Recipe, tokens: int, spent: float = 0.0) -> float:
    return lr_ratio(recipe.schedule, tokens_seen=tokens, total_tokens=recipe.train.tokens, spent_ratio=spent)


def _same_masks(old: Recipe, new: Recipe, steps: int) -> bool:
    """A rate that changes towards the end of the run must not have begun to."""
    section = new.objective
    if not isinstance(section, Masks) or section.final_rate is None:
        return True
    ends = {recipe.batches.num_positions for recipe in (old, new)}  # changed by train.tokens, or longer sequences
    first = min(ends) * (1 - section.decay_ratio)
    return len(ends) == 1 or old.batches.first_position(steps) <= first


def _about_lengths(old: Recipe, new: Recipe, step: int) -> Iterator[str]:
    """What a changed length or schedule does to the learning rate, in words."""
    changed = [(p, a, b) for p, a, b in difference(old, new) if under(p, LENGTH_FIELDS)]
    if not changed:
        return
    yield "; ".join(f"{path}: {before} there, {now} now" for path, before, now in changed)
    plan, rates = new.batches, [0.0, 0.0]
    rates = [_ratio(recipe, plan.tokens_before(step)) for recipe in (old, new)]
    end = min(old.steps, new.steps)
    ends = [_ratio(recipe, plan.tokens_before(end - 1)) for recipe in (old, new)]
    change = _first(range(step, new.steps), lambda s: _ratio(new, plan.tokens_before(s)) != rates[1])
    held = "to the end" if change is None else f"up to step {change}" if change > step else "in no further step"
    yield (
        f"the learning rate of the {step} completed steps is that of both recipes; it stays at {rates[1]:.4g} of its "
        f"peak {held}; step {end} has {ends[1]:.4g} of it instead of {ends[0]:.4g}, and the last, step {new.steps}, "
        f"{_ratio(new, plan.tokens_before(new.steps - 1)):.4g}"
        + ("" if new.train.max_hours is None else "; all by tokens: by train.max_hours it may fall earlier")
    )


def _other_rates(old: Recipe, new: Recipe, newest: Checkpoint) -> CheckpointError:
    changed = [(p, a, b) for p, a, b in difference(old, new) if under(p, (*LENGTH_FIELDS, "data.stages"))]
    lines = "".join(f"\n    {path}: {before!r} there, {now!r} now" for path, before, now in changed)
    step = _first_other_step(old, new, min(newest.step, new.steps))
    if newest.step > new.steps and step is None:
        why = f"the run has made {newest.step} steps already, more than {new.steps}"
    elif step is None and not _same_masks(old, new, newest.step):
        why = "the rate of masks had begun to change"
    elif step is None:
        why = (
            f"by the hours that it took, the learning rate was at {rate_at(old, newest):.4g} of its peak after step "
            f"{newest.step}, and would have been at {rate_at(new, newest):.4g}"
        )
    else:
        assert step is not None
        tokens = old.batches.tokens_before(step)
        why = (
            f"step {step + 1} had {_ratio(old, tokens):.4g} of the peak learning rate, and would have had "
            f"{_ratio(new, tokens):.4g}"
        )
    return CheckpointError(
        f"the run cannot be given another length or schedule:{lines}\n    {why}, and no checkpoint from before is kept",
        where=str(newest.path),
        remedy=f"begin a new run with these weights, a warmup and a schedule of its own: model.from={newest.path}; "
        + _what_to_keep(old, step),
    )


def _what_to_keep(old: Recipe, step: int | None) -> str:
    """Which checkpoint would have let the run go on, and how a later run keeps it."""
    if not isinstance(old.schedule, WsdSchedule) or not step:
        return "constant, and wsd before its decay, can be extended"
    return (
        f"a checkpoint of step {step} or before, which checkpoint.keep_last={old.checkpoint.keep_last} did not keep, "
        "would have let it go on: in the next run set checkpoint.keep_every_steps, for those stay for ever"
    )
