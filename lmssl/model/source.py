"""Where a continued model lies: a folder, a run folder or a name on the Hub; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmssl.errors import ModelError
from lmssl.recipe.family import ContinuedModel, ModelBase
from lmssl.recipe.model import FAMILIES
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

WANTED = ("*.json", "*.safetensors", "*.jinja", "generator/*.json", "generator/*.safetensors")
"""What is taken from the Hub; no code and no pickle."""


@dataclass(frozen=True)
class Source:
    """A model that exists, as files."""

    name: str
    """As the recipe calls it."""
    path: Path
    """Folder with config.json and safetensors."""
    config: dict[str, Any]
    tokenizer_path: Path
    """Folder of its tokenizer, where it has one."""
    of_run: bool
    """A checkpoint of ours, whose tensors have the names of parameters; else a transformers folder."""
    commit: str | None
    """On the Hub."""

    @property
    def kind(self) -> str:
        """The `model_type`."""
        return str(self.config.get("model_type"))

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None where the folder has none."""
        exists = (self.tokenizer_path / "tokenizer.json").is_file()
        return load_tokenizer(self.tokenizer_path) if exists else None


def newest_step(run: Path) -> Path:
    """Folder of a run's newest checkpoint, its sums unseen; that of a checkpoint is itself.

    Raises:
        ModelError: there is none.
    """
    if (run / "manifest.json").is_file():
        return run
    steps = sorted(path.parent for path in (run / "checkpoints").glob("step-*/manifest.json"))
    if not steps:
        raise ModelError("the run has no checkpoint", where=str(run), remedy="train it first")
    return steps[-1]


def open_source(
    section: ContinuedModel, *, choose: Callable[[Path], Path] = newest_step, download: bool = True
) -> Source:
    """Find the model that a recipe continues, and read its config.

    Args:
        choose: a folder of a run or a checkpoint to that of a checkpoint.
        download: from the Hub what is not in its cache; else only what is.
    Raises:
        ModelError: no such folder or name, no config, no safetensors.
    """
    folder, commit = Path(section.source).expanduser(), None
    if not folder.is_dir():
        folder = _from_hub(section, download=download)
        commit = folder.name
    elif section.revision is not None:
        raise ModelError(
            "a folder has no revisions", where="model.revision", remedy="leave it out, or name a model on the Hub"
        )
    of_run = (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file()
    path = choose(folder) if of_run else folder
    tokenizer_path = path.absolute().parents[1] / "tokenizer" if of_run else folder
    config = _read_config(path)
    if download:
        check_weights(path)
    return Source(section.source, path, config, tokenizer_path, of_run, commit)


def check_weights(folder: Path) -> None:
    """See that a folder has safetensors.

    Raises:
        ModelError: it has none; says so where there are pickles instead.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt", "*.h5") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"the weights are in {pickles[0]}, which can run code when it is read; only safetensors are",
            where=str(folder),
            remedy="load the model once where you trust it and save_pretrained it, which writes model.safetensors",
        )
    raise ModelError("the folder has no safetensors", where=str(folder), remedy="give the folder of a model")


def as_section(config: dict[str, Any]) -> ModelBase | None:
    """The `model` section that builds a model of this config, for formulas; None: the family has none, or differs."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    rope = config.get("rope_parameters") or {}
    thetas = {"rope_theta": rope.get("rope_theta")}
    thetas |= {f"{name}_rope_theta": rope.get(f"{long}_attention", {}).get("rope_theta") for name, long in _THETAS}
    known = thetas | {key: value for key, value in config.items() if value is not None}
    given = {key: known[key] for key in family.model_fields if known.get(key) is not None}
    try:
        return family.model_validate({**given, "kind": config["model_type"]})
    except ValidationError:
        return None


def stand_in(model: ModelBase) -> tuple[ModelBase, str]:
    """What the formulas take for a `model` section, and why there is none for a continued one.

    A continued model that is not on this machine, or of a family without formulas, stays as it is.
    """
    if not isinstance(model, ContinuedModel):
        return model, ""
    try:
        found = open_source(model, download=False)
    except ModelError as error:
        return model, f"{model.source} is not here: {error.what}"
    section = as_section(found.config)
    return (model, f"no formula for {found.kind}") if section is None else (section, "")


_THETAS: Sequence[tuple[str, str]] = (("global", "full"), ("local", "sliding"))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "there is no config.json",
            where=str(path),
            remedy="give a folder that save_pretrained or `lmssl export` wrote, or a run folder",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=str(file), remedy="copy it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json names no model_type", where=str(file), remedy="give a transformers model")
    if "auto_map" in config and config["model_type"] not in FAMILIES:
        raise ModelError(
            "the model brings code of its own, which is not run here",
            where=f"auto_map in {file}",
            remedy="use a model of a family that transformers has",
        )
    return config


def _from_hub(section: ContinuedModel, *, download: bool) -> Path:
    """The snapshot folder of a model on the Hub, whose name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = section.source
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise ModelError("there is no such folder", where=f"model.from = {name}", remedy="give a folder that exists")
    try:
        return Path(
            snapshot_download(
                name, revision=section.revision, allow_patterns=list(WANTED), local_files_only=not download
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = "" if section.revision is None else f", model.revision = {section.revision}"
        raise ModelError(
            f"there is no such folder, and no such model could be had from the Hub: {first}",
            where=f"model.from = {name}{at}",
            remedy="check the name; for a private one log in with `hf auth login`; offline, give a folder",
        ) from error
