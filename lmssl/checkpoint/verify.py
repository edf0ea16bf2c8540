"""All checkpoints of a run, read in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmssl.checkpoint.folder import TEMPORARY, checkpoints_path, read_manifest, step_folders, step_of, validate
from lmssl.checkpoint.space import shown_bytes
from lmssl.errors import CheckpointError


def verify(run: Path, report: Callable[[str], None]) -> list[int]:
    """Say of every checkpoint whether it is whole, and what is wrong with it; returns the steps of whole ones.

    Raises:
        CheckpointError: one is damaged, or there is none.
    """
    whole: list[int] = []
    damaged: list[int] = []
    for path in step_folders(run):
        problem = validate(path, thoroughly=True)
        (damaged if problem else whole).append(step_of(path))
        report(f"{path.name}: " + (f"damaged: {problem}" if problem else _described(path)))
    for path in sorted(checkpoints_path(run).glob(f"{TEMPORARY}*")):
        report(f"{path.name}: left behind by a save that was killed, or being written; the next start removes it")
    if not whole and not damaged:
        raise CheckpointError("no checkpoint was saved", where=str(run), remedy="is this a run folder? Train first")
    if damaged:
        goes_on = f"the run continues from step {whole[-1]}" if whole else "the run would begin anew"
        steps = ", ".join(map(str, damaged))
        raise CheckpointError(
            f"{len(damaged)} of {len(whole) + len(damaged)} checkpoints are damaged: of step {steps}",
            where=str(checkpoints_path(run)),
            remedy=f"remove their folders, or restore them from a copy; {goes_on}",
        )
    return whole


def _described(path: Path) -> str:
    manifest = read_manifest(path)
    assert not isinstance(manifest, str)
    files = manifest["files"]
    size = shown_bytes(sum(file["size"] for file in files.values()))
    loss = manifest.get("validation_loss")
    return (
        f"whole, {size} in {len(files)} files"
        + (f", validation loss {loss:.4f}" if loss is not None else "")
        + ("" if manifest.get("finite", True) else ", losses before it were not finite")
    )
