"""A run that begins at a checkpoint of another: the decay of a warmup-stable-decay run, as often as one likes.

The new run reads on where the other one stood, with its weights and optimiser; the other run's folder is only read.
Source: decays branched off one stable run, as Hägele et al. 2024 train models of many lengths by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint
from lmssl.errors import CheckpointError
from lmssl.recipe.load import Loaded, difference, load_recipe
from lmssl.recipe.schedule import ConstantSchedule, WsdSchedule
from lmssl.recipe.sections import Recipe
from lmssl.train.changes import FREE_FIELDS, LENGTH_FIELDS, rate_at, same_history, under

_DECAY_RATIO = 0.2
"""Share of the whole run in the decay, where neither the command nor the recipe says."""


def branch_recipe(
    source: str,
    *,
    recipe: Path | None,
    overrides: Sequence[str] = (),
    decay_tokens: int | None = None,
    decide: Callable[[Callable[[], str]], str] = lambda newest: newest(),
) -> Loaded:
    """The recipe of a run that decays from a checkpoint of another.

    Its folder and name are the other's with step and tokens added, unless `overrides` say otherwise; the schedule's
    form and floor may be overridden, too.

    Args:
        source: a run folder, with `@STEP` for a checkpoint other than the newest.
        recipe: what the other run was made by; None: the recipe in its folder.
        decay_tokens: length of the decay; None: the recipe's `decay_ratio` of the new run.
        decide: given what finds the newest step, answers the same step on all ranks.
    Raises:
        LmsslError: no such checkpoint, no wsd or constant schedule, a rate that is not at its peak there, another
            recipe.
    """
    run, step = _parsed(source)
    if step is None:
        step = int(decide(lambda: str(checkpoint.find_step(run, None).step)))
    found = checkpoint.find_step(run, step)
    parent = load_recipe(found.path / "recipe.yaml").recipe
    given = load_recipe(recipe or found.path / "recipe.yaml", overrides).recipe
    before = parent.batches.tokens_before(found.step)
    schedule = _decay_of(given, found)
    _require_peak(parent, found, before)
    if decay_tokens is None:
        share = schedule.decay_ratio or _DECAY_RATIO
        decay_tokens = round(before * share / (1 - share)) if share < 1 else before
    # Whole steps, for the budget is rounded up to them, and the rate falls by tokens.
    whole = parent.train.batch_tokens
    decay_tokens = max(1, round(decay_tokens / whole)) * whole
    total = before + decay_tokens
    suffix = f"step-{found.step}-decay-{decay_tokens}"
    changes = {
        "schedule": json.dumps(schedule.model_dump() | {"decay_ratio": decay_tokens / total}),
        "train.tokens": str(total),
        "branch": json.dumps({"run": str(run), "step": found.step}),
    }
    if given.name == parent.name:
        changes["name"] = f"{parent.name}-{suffix}"
    if given.train.precision == "auto":
        changes["train.precision"] = parent.train.precision
    if Path(given.out_path) in (Path(parent.out_path), run):
        changes["out"] = json.dumps(f"{str(run).rstrip('/')}-{suffix}")
    if given.train.max_hours == parent.train.max_hours:
        changes["train.max_hours"] = "null"
    own = {text.partition("=")[0] for text in overrides}
    kept = [text for text in overrides if not under(text.partition("=")[0], ("schedule", "train.tokens"))]
    added = [
        f"{key}={value}" for key, value in changes.items() if key not in own or key in ("schedule", "train.tokens")
    ]
    loaded = load_recipe(recipe or found.path / "recipe.yaml", [*kept, *added])
    branch_point(loaded.recipe)
    return loaded


def branch_point(recipe: Recipe) -> Checkpoint | None:
    """The checkpoint of another run at which a recipe's run begins; None: it begins with its first step.

    Raises:
        CheckpointError: it is not there, was made by another recipe, or had other learning rates on its way.
    """
    if recipe.branch is None:
        return None
    run = Path(recipe.branch.run)
    found = checkpoint.find_step(run, recipe.branch.step)
    parent = load_recipe(found.path / "recipe.yaml").recipe
    free = (*FREE_FIELDS, *LENGTH_FIELDS, "branch")
    changed = [(path, old, new) for path, old, new in difference(parent, recipe) if not under(path, free)]
    if changed:
        lines = "".join(f"\n    {path}: {old!r} there, {new!r} now" for path, old, new in changed[:8])
        raise CheckpointError(
            f"the run in {run} was made by another recipe:{lines}",
            where=str(found.path),
            remedy="a branch differs in name, folder, budget and schedule only; undo the other changes",
        )
    if not same_history(parent, recipe, found):
        raise CheckpointError(
            f"the {found.step} steps before the branch had other learning rates, or rates of masks, than this recipe's",
            where=str(found.path),
            remedy="let `lmssl train --from-checkpoint RUN@STEP --decay` make the recipe, or take an earlier step",
        )
    return found


def _parsed(source: str) -> tuple[Path, int | None]:
    """Run folder and step.

    >>> _parsed("runs/gpt@500"), _parsed("runs/gpt")
    ((PosixPath('runs/gpt'), 500), (PosixPath('runs/gpt'), None))
    """
    found = re.fullmatch(r"(.+)@(\d+)", source)
    run, step = (Path(found[1]), int(found[2])) if found else (Path(source), None)
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder", where="--from-checkpoint", remedy="write RUN or RUN@STEP")
    return run, step


def _decay_of(recipe: Recipe, found: Checkpoint) -> WsdSchedule:
    schedule = recipe.schedule
    if isinstance(schedule, ConstantSchedule):
        return WsdSchedule(kind="wsd", warmup_tokens=schedule.warmup_tokens)
    if isinstance(schedule, WsdSchedule):
        return schedule
    raise CheckpointError(
        f"a {schedule.kind} schedule falls from its peak on, so there is nothing to branch off",
        where=f"schedule.kind in {found.path / 'recipe.yaml'}",
        remedy="train with wsd or constant; to go on with these weights begin a new run: model.from",
    )


def _require_peak(parent: Recipe, found: Checkpoint, tokens: int) -> None:
    ratio = rate_at(parent, found)
    if ratio == 1.0 and tokens >= parent.schedule.warmup_tokens:
        return
    part = "in its warmup" if tokens < parent.schedule.warmup_tokens else "already in its decay"
    raise CheckpointError(
        f"the run is {part} at step {found.step}: its learning rate is at {ratio:.3g} of the peak",
        where=str(found.path),
        remedy="branch off a checkpoint from its stable part (checkpoint.keep_every_steps keeps some): RUN@STEP",
    )
