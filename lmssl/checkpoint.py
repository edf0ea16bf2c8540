"""Checkpoints: written whole or not at all, found only when whole.

::

    RUN/checkpoints/step-00000500/
        model.safetensors    every weight once, float32, full shape, by the stock model's parameter names
        optim.safetensors    `<state>/<parameter>`
        ema.safetensors      with `train.ema_decay`: the moving average of every weight, as model.safetensors
        state.json  ledger.jsonl  recipe.yaml  config.json
        manifest.json        format, step, size and sha256 of each file; written last

A folder without a manifest that matches is no checkpoint. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmssl.errors import CheckpointError

FORMAT = 1
"""Version of the layout above; a reader refuses what it does not know."""

AVERAGES = "ema.safetensors"
"""The file of averaged weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint folder."""

    path: Path
    step: int

    def text(self, name: str) -> str:
        """Contents of one of its text files."""
        return (self.path / name).read_text(encoding="utf-8")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one of its safetensors files, on CPU."""
        return load_file(self.path / name)


def checkpoints_path(run: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run / "checkpoints"


def save(run: Path, step: int, *, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, str]) -> Checkpoint:
    """Write `step-N` atomically: temporary folder, files fsynced, manifest last, rename.

    Args:
        tensors: file name to named tensors, all on CPU.
        texts: file name to contents.
    Raises:
        CheckpointError: the folder cannot be written; earlier checkpoints are untouched and the partial one removed.
    """
    parent = checkpoints_path(run)
    target, partial = parent / f"step-{step:08d}", parent / f".tmp-step-{step:08d}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, named in tensors.items():
            save_file(named, partial / name, metadata={"format": "pt"})
            (partial / name).chmod(0o644)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        files = {name: _fingerprint(partial / name, sync=True) for name in (*tensors, *texts)}
        manifest = {"format": FORMAT, "step": step, "files": files}
        write_synced(partial / "manifest.json", json.dumps(manifest, indent=1))
        sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)  # only ever an invalid one: valid steps are not written twice
        partial.rename(target)
        sync_folder(parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own kind
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(target),
            remedy="free disk space or fix permissions, then run the same command; earlier checkpoints are intact",
        ) from error
    return Checkpoint(target, step)


def prune(run: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, and leftovers of saves that were killed."""
    steps = _step_folders(run)
    for path in steps[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints_path(run).glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def find_latest(run: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run; says which newer ones it passed over, and why."""
    for path in reversed(_step_folders(run)):
        problem = validate(path)
        if problem is None:
            return Checkpoint(path, int(path.name.removeprefix("step-")))
        report(f"checkpoint {path.name} is not used: {problem}")
    return None


def find_step(run: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest.

    Raises:
        CheckpointError: there is none, or it is damaged; names the steps there are.
    """
    problems: list[str] = []
    if step is None:
        found = find_latest(run, problems.append)
    else:
        path = checkpoints_path(run) / f"step-{step:08d}"
        problem = validate(path)
        found = Checkpoint(path, step) if problem is None else None
        problems = [problem] if problem else []
    if found is None:
        steps = [int(p.name.removeprefix("step-")) for p in _step_folders(run)]
        which = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"no valid checkpoint{which}: {'; '.join(problems) or 'none was saved'}",
            where=str(run),
            remedy=f"steps there: {', '.join(map(str, steps))}" if steps else "is this a run folder? Train first",
        )
    return found


def validate(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name, sync=False) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is unreadable ({type(error).__name__})"
    return None


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight once, float32 on CPU; tied ones under their first name."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in named.items()}


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy weights by name into a model.

    Raises:
        CheckpointError: names or shapes differ; names the first that does.
    """
    named = dict(model.named_parameters())
    differing = sorted(set(named) ^ set(tensors))
    differing += [name for name in named if name in tensors and named[name].shape != tensors[name].shape]
    if differing:
        raise CheckpointError(
            f"weights do not fit the model: {differing[0]!r} and {len(differing) - 1} more differ in name or shape",
            where=where,
            remedy="use the recipe this checkpoint was made with",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser tensors as `<state>/<parameter>`, float32 on CPU."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value.detach().to("cpu", torch.float32).contiguous()
    return found


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `<state>/<parameter>` tensors back; `step` stays where the fused kernel wants it."""
    named = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        key, name = full.split("/", 1)
        states.setdefault(name, {})[key] = tensor.to(named[name].device)
    for name, state in states.items():
        optimizer.state[named[name]] = state


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_folders(run: Path) -> list[Path]:
    return sorted(p for p in checkpoints_path(run).glob("step-*") if p.name.removeprefix("step-").isdecimal())


def _fingerprint(path: Path, *, sync: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}
