"""A clean folder of what is uploaded: files of an allow-list, a marker that says what they are, and nothing private."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from lmssl.errors import PushError
from lmssl.release.marker import MARKER, checksum, read_marker, write_marker
from lmssl.release.private import findings

ALLOWED = re.compile(
    r"(?:generator/)?(?:"
    r"README\.md|LICENSE|config\.json|generation_config\.json|model(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|chat_template\.jinja"
    r")|adapter_config\.json|adapter_model\.safetensors|modules\.json|sentence_bert_config\.json"
    r"|config_sentence_transformers\.json|1_Pooling/config\.json"
    r"|training_curve\.svg|[A-Za-z0-9._-]+\.gguf|onnx/model\.onnx(?:\.data)?"
)
"""What may be uploaded; anything else stays here and is named."""

_WEIGHTS = re.compile(r"(?:model|adapter_model).*\.safetensors")
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "use_cache")


@dataclass(frozen=True)
class Staged:
    """What is ready to be uploaded."""

    folder: Path
    sizes: dict[str, int]
    """Bytes by name, sorted; the marker is one of them."""
    identity: str
    """The same for all that was exported from one run."""
    left_out: tuple[str, ...]
    """Names in the source that may not be uploaded."""

    @property
    def marker(self) -> dict[str, Any]:
        """What the marker says."""
        found: dict[str, Any] = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
        return found


def stage(source: Path, folder: Path, *, public: bool, licence: str | None, private: Sequence[str]) -> Staged:
    """Gather the files of a model folder.

    Args:
        source: an export, or any folder that save_pretrained wrote; it is only read.
        folder: empty, on the same disk if copies are to cost nothing.
        public: everybody will see it, so its card must name a licence.
        licence: what the card shall name, in the Hub's words; None: what it names.
        private: words that must not be in any file, such as the name of this machine.
    Raises:
        PushError: the folder is no model, was changed after its export, names no licence or holds something private.
    """
    names, left_out = _names(source)
    _check_model(source, names)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _place(source / name, folder / name)
    given = read_marker(source)
    _check_unchanged(given, folder, names)
    _license(folder, public=public, licence=licence)
    found = list(findings(folder, private))
    if found:
        raise PushError(
            f"something private would be uploaded: {'; '.join(found[:3])}",
            where=str(source),
            remedy="remove it from the file, or from the recipe it comes from, and export again",
        )
    identity = str(given["identity"]) if "identity" in given else _identity(source)
    write_marker(folder, {**given, "identity": identity})
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    return Staged(folder, dict(sorted(sizes.items())), identity, left_out)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _names(source: Path) -> tuple[list[str], tuple[str, ...]]:
    """Names that may be uploaded, and the others. Links are others: they lead out of the folder."""
    if not source.is_dir():
        raise PushError("there is no such folder", where=str(source), remedy="give an export or a run folder")
    taken: list[str] = []
    left: list[str] = []
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        linked = any(part.is_symlink() for part in (path, *path.parents) if source in part.parents)
        if name != MARKER:
            (taken if ALLOWED.fullmatch(name) and not linked else left).append(name)
    return taken, tuple(left)


def _check_model(source: Path, names: list[str]) -> None:
    """A model is a config and weights as safetensors, all of their files."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    described = any(name in names for name in ("config.json", "adapter_config.json"))
    if not described or not weights:
        missing = "config.json" if not described else "no weights as safetensors"
        raise PushError(
            f"the folder is no model: it has {missing if described else f'no {missing}'}",
            where=str(source),
            remedy="give a run folder, or a folder that `lmssl export` or save_pretrained wrote",
        )
    try:
        if "config.json" in names:
            _read_object(source / "config.json")
        wanted = set(weights)
        if "model.safetensors.index.json" in names:
            wanted = set(_read_object(source / "model.safetensors.index.json")["weight_map"].values())
        for name in sorted(wanted):
            with safe_open(source / name, framework="np") as file:
                file.keys()
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise PushError(
            f"the folder is no whole model: {error}", where=str(source), remedy="export again; nothing was uploaded"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _place(source: Path, target: Path) -> None:
    """Weights by a link to the same bytes where the disk allows it; small files, which may be edited, as copies."""
    try:
        if target.suffix in (".safetensors", ".gguf", ".onnx", ".data"):
            os.link(source, target)
            return
    except OSError:  # another disk, or one without links
        target.unlink(missing_ok=True)
    shutil.copyfile(source, target)


def _check_unchanged(marker: dict[str, Any], folder: Path, names: list[str]) -> None:
    """Weights are those that were proven at export; a card or a config may have been edited since."""
    for name, expected in marker.get("files", {}).items():
        if not name.endswith((".safetensors", ".gguf", ".onnx", ".data")):
            continue
        problem = "is missing" if name not in names else "was changed"
        if name not in names or checksum(folder / name) != expected:
            raise PushError(f"{name} {problem} since the export", where=name, remedy="export again")


def check_license(licence: str | None, *, public: bool, where: str) -> None:
    """A licence in the Hub's words, or none where nobody else will see the model.

    Raises:
        PushError: everybody will see it and there is none, or it is in other words.
    """
    if public and not licence:
        raise PushError(
            "the card names no licence, and everybody will see the model",
            where=where,
            remedy="give --license, such as apache-2.0, or the recipe a card.license",
        )
    if where == "--license" and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(licence)):
        raise PushError(
            f"{licence!r} is no licence in the Hub's words", where=where, remedy="such as apache-2.0 or other"
        )


def _license(folder: Path, *, public: bool, licence: str | None) -> None:
    """Give the card the licence, and insist on one where everybody will see it."""
    path = folder / "README.md"
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: transformers\n---\n")
    except Exception as error:  # its YAML is whatever somebody wrote, and the parser has errors of its own
        raise PushError(
            f"the card's front matter is no YAML: {str(error).splitlines()[0]}",
            where="README.md",
            remedy="mend README.md",
        ) from error
    if licence is not None:
        card.data["license"] = licence
    check_license(card.data.get("license"), public=public, where="README.md" if licence is None else "--license")
    if licence is not None or not path.exists():
        card.save(path)


def _identity(source: Path) -> str:
    """Of a folder without a marker: what its config and tokenizer are, apart from what a library changes by itself."""
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        path = source / name
        if path.exists():
            values = {key: value for key, value in _read_object(path).items() if key not in _VOLATILE}
            digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()[:16]
