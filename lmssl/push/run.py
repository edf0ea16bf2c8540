"""`lmssl push`: export where needed, gather, look, upload; a run in progress is only read."""

from __future__ import annotations

import json
import re
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmssl.errors import CheckpointError, ExportError, LmsslError, PushError
from lmssl.push.hub import PATIENCE_SECONDS, Hub
from lmssl.push.staging import Staged, check_license, stage
from lmssl.recipe.load import load_recipe
from lmssl.release.marker import run_identity, source_of

MAIN = "main"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Push:
    """What is pushed where, as the command line says it."""

    source: Path
    """An export, or a run folder."""
    repo: str
    public: bool = False
    licence: str | None = None
    dry_run: bool = False
    revisions: str | None = None
    """Of a run: a template for the names of revisions, one for each checkpoint; None: only `main` is pushed."""
    step: int | None = None
    """Of a run: which checkpoint goes to `main`; None: the newest."""
    ema: bool = False
    average: int = 1
    dtype: str = "float32"
    max_shard_size: str = "5GB"

    @property
    def is_run(self) -> bool:
        """Whether the source is a run folder."""
        return (self.source / "checkpoints").is_dir()


def refuse_token(token: str | None) -> None:
    """A token on a command line stays in histories and lists of processes.

    Raises:
        PushError: there is one.
    """
    if token is not None:
        raise PushError(
            "a token is never given on the command line",
            where="--token",
            remedy="run `hf auth login`, or set HF_TOKEN; make a new token, for others may have seen this one",
        )


def push(
    wanted: Push,
    *,
    sleep: Callable[[float], None],
    private: Sequence[str] = (),
    report: Report = print,
    patience_seconds: float = PATIENCE_SECONDS,
) -> list[str]:
    """Upload an export, or checkpoints of a run, and return the names of the revisions that were changed.

    Nothing is uploaded twice, and a push that was interrupted goes on when it is repeated. Revisions are those of the
    checkpoints at its start; one that cannot be exported keeps none of the others, and is raised at the end.

    Args:
        sleep: waits so many seconds; only where the Hub does not answer.
        private: words that must not be in any file.
        patience_seconds: the longest time to wait for one answer, pauses only.
    Raises:
        PushError: the source is no model, something private is in it, or the Hub refused.
        LmsslError: a checkpoint cannot be exported.
    """
    if not wanted.is_run and (wanted.revisions, wanted.step, wanted.ema, wanted.average) != (None, None, False, 1):
        raise PushError(
            "--revisions, --step, --ema and --average choose among the checkpoints of a run, and this is none",
            where=str(wanted.source),
            remedy="give the run folder, or leave them out",
        )
    if wanted.is_run:
        _check_license(wanted)
    names = revision_names(wanted) if wanted.revisions is not None else {}
    pushing = _Pushing(wanted, tuple(private), report)
    if wanted.dry_run:
        pushing.show(names)
        return []
    hub = Hub(wanted.repo, sleep=sleep, report=report, patience_seconds=patience_seconds)
    report(f"signed in as {hub.sign_in()}")
    changed: list[str] = []
    failed: list[LmsslError] = []
    with tempfile.TemporaryDirectory(prefix="lmssl-push-") as folder:
        # Before the repository is made, so that a mistake here leaves none behind.
        main = pushing.gather(wanted.step, Path(folder) / MAIN)
        hub.open(public=wanted.public)
        hub.check_same(hub.there(MAIN), main.identity)
        present = hub.branches() if names else set()
        for step, name in names.items():
            try:
                if pushing.push_step(hub, step, name, present, Path(folder) / name.replace("/", "_")):
                    changed.append(name)
            except (CheckpointError, ExportError) as error:
                report(f"{name} is passed over: {error.what}")
                failed.append(error)
        if hub.publish(main, MAIN, pushing.message(main)):
            changed.append(MAIN)
    where = f"{hub.api.endpoint}/{wanted.repo}"
    report(f"{where}: {', '.join(changed)} uploaded" if changed else f"{where} is up to date; nothing was uploaded")
    if failed:
        raise failed[0]
    return changed


def _check_license(wanted: Push) -> None:
    """Before minutes of exporting: what the card would name."""
    if wanted.licence is not None:
        check_license(wanted.licence, public=wanted.public, where="--license")
        return
    from lmssl.checkpoint.folder import step_folders, step_of  # with torch, which pushing a folder does without

    folders = [path for path in step_folders(wanted.source) if wanted.step in (None, step_of(path))]
    recipe = folders[-1] / "recipe.yaml" if folders else None
    if recipe is not None and recipe.is_file():  # otherwise the export says what is wrong
        check_license(load_recipe(recipe).recipe.card.license, public=wanted.public, where=str(wanted.source))


@dataclass(frozen=True)
class _Pushing:
    wanted: Push
    private: tuple[str, ...]
    report: Report

    def gather(self, step: int | None, folder: Path) -> Staged:
        """Export if the source is a run, and stage."""
        wanted, source = self.wanted, self.wanted.source
        if wanted.is_run:
            from lmssl.export import ExportWeights, export_run

            source = folder / "export"
            weights = ExportWeights(wanted.ema, wanted.average, wanted.dtype)
            size = wanted.max_shard_size
            export_run(
                wanted.source, step, source, lambda _: None, weights=weights, max_shard_size=size, private=self.private
            )
        staged = stage(source, folder / "staged", public=wanted.public, licence=wanted.licence, private=self.private)
        if staged.left_out:
            self.report(f"not uploaded, because only known files of a model are: {', '.join(staged.left_out)}")
        return staged

    def push_step(self, hub: Hub, step: int, name: str, present: set[str], folder: Path) -> bool:
        """Bring one checkpoint to its revision, unless it is there; a run in progress may have removed it meanwhile."""
        wanted = self.wanted
        checkpoint = wanted.source / "checkpoints" / f"step-{step:08d}"
        try:
            if name in present:
                there = hub.there(name)
                identity = run_identity(wanted.source)
                hub.check_same(there, identity)
                chosen = {"ema": wanted.ema, "average": wanted.average, "dtype": wanted.dtype}
                if there.marker.get("identity") == identity and there.marker.get("source") == source_of(
                    checkpoint, chosen
                ):
                    return False
            staged = self.gather(step, folder)
        except PushError:
            raise
        except (LmsslError, OSError, ValueError, KeyError) as error:
            if not checkpoint.exists():
                self.report(f"the checkpoint of step {step} was removed by its run meanwhile")
                return False
            if isinstance(error, LmsslError):
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be read: {error}",
                where=str(checkpoint),
                remedy=f"see what `lmssl verify {wanted.source}` says of it",
            ) from error
        hub.add_branch(name)
        done = hub.publish(staged, name, self.message(staged))
        if done:
            self.report(f"{name} uploaded")
        return done

    def message(self, staged: Staged) -> str:
        """Of the commit."""
        source = staged.marker.get("source", {})
        return f"Step {source['step']:,}" if "step" in source else "Upload model"

    def show(self, names: dict[int, str]) -> None:
        """What would be uploaded; nothing is asked of the Hub."""
        wanted = self.wanted
        with tempfile.TemporaryDirectory(prefix="lmssl-push-") as folder:
            staged = self.gather(wanted.step, Path(folder) / MAIN)
            self.report(f"{wanted.repo}, {'public' if wanted.public else 'private'}, revision {MAIN}")
            for name, size in staged.sizes.items():
                self.report(f"{size:>16,}  {name}")
            self.report(f"{sum(staged.sizes.values()):>16,}  bytes in {len(staged.sizes)} files")
        for step, name in names.items():
            self.report(f"revision {name}: step {step:,}")
        self.report("a dry run: nothing was uploaded")


def revision_names(wanted: Push) -> dict[int, str]:
    """Name of the revision of each checkpoint of a run, by step.

    Raises:
        PushError: the template knows other fields, gives no names of branches, or the same one twice.
    """
    template = wanted.revisions or ""
    names: dict[int, str] = {}
    for state in _states(wanted.source):
        tokens = int(state["tokens_seen"])
        fields = {
            "step": int(state["step"]),
            "tokens": tokens,
            "tokens_m": round(tokens / 1e6),
            "tokens_b": round(tokens / 1e9),
        }
        names[fields["step"]] = _filled(template, fields)
    wrong = next(
        (n for n in names.values() if not re.fullmatch(r"(?!.*(\.\.|//))[A-Za-z0-9][\w./-]*(?<![./])", n)), None
    )
    if wrong is not None or MAIN in names.values():
        raise PushError(
            f"{wrong if wrong is not None else MAIN!r} cannot be the name of a revision",
            where="--revisions",
            remedy="use letters, digits, - and _, such as step{step}",
        )
    if len(set(names.values())) < len(names):
        raise PushError(
            f"{template} gives several checkpoints the same name",
            where="--revisions",
            remedy="let {step} be part of it",
        )
    return names


def _filled(template: str, fields: dict[str, int]) -> str:
    try:
        unknown = [
            name for _, name, _, _ in string.Formatter().parse(template) if name is not None and name not in fields
        ]
        if unknown:
            raise ValueError(f"{{{unknown[0]}}} is not known")
        return template.format(**fields)
    except ValueError as error:
        raise PushError(
            f"{template} is no template: {error}",
            where="--revisions",
            remedy=f"fields are {', '.join(f'{{{name}}}' for name in fields)}",
        ) from error


def _states(run: Path) -> list[dict[str, Any]]:
    """States of the checkpoints there are; those that are being removed or written are left out."""
    found = []
    for path in sorted((run / "checkpoints").glob("step-*")):
        try:
            found.append(json.loads((path / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return found
