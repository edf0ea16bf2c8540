"""Load a tokenizer folder: the backend, its control tokens and a fingerprint of what decides ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from lmssl.errors import TokenizerError

ROLES = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
"""The control tokens that transformers names; each is `<role>_token` in a config file."""

_NOT_IN_FINGERPRINT = ("padding", "truncation")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer: `backend` as stored, ids of its control tokens, and what identifies it."""

    path: Path
    backend: tokenizers.Tokenizer
    fingerprint: str
    """sha256 of `tokenizer.json` with sorted keys, without padding and truncation."""
    num_tokens: int
    """Largest id + 1."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None

    @property
    def end_id(self) -> int | None:
        """What ends a text that a model writes: eos, or where there is none sep, which then ends every segment."""
        return self.sep_id if self.eos_id is None else self.eos_id

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens written out."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a folder that holds `tokenizer.json` and, for its control tokens, `tokenizer_config.json`.

    Raises:
        TokenizerError: no such folder, no `tokenizer.json`, malformed JSON, or a control token without an id.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not folder.is_dir():
        raise TokenizerError(
            "there is no such tokenizer folder",
            where=str(folder),
            remedy="give a folder written by `lmssl tokenizer` or by save_pretrained",
        )
    if not file.is_file():
        raise TokenizerError(
            "the tokenizer folder holds no tokenizer.json",
            where=str(folder),
            remedy="load it once with AutoTokenizer and save_pretrained it: that writes the fast format",
        )
    content = _read_json(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(
            f"tokenizer.json is not a tokenizer: {error}", where=str(file), remedy="write the folder again"
        ) from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise TokenizerError("the tokenizer has no tokens", where=str(file), remedy="train it again")
    ids = {f"{role}_id": _control_id(folder, role, vocabulary) for role in ROLES}
    return Tokenizer(folder, backend, _fingerprint(content), max(vocabulary.values()) + 1, **ids)


def _control_id(folder: Path, role: str, vocabulary: dict[str, int]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        token = _read_json(file).get(f"{role}_token") if file.is_file() else None
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if token not in vocabulary:
            raise TokenizerError(
                f"{role}_token {token!r} is not in the vocabulary",
                where=str(file),
                remedy=f"add the token to tokenizer.json, or set {role}_token to null",
            )
        return vocabulary[token]
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(file.read_bytes())
    except ValueError as error:
        raise TokenizerError(
            f"{file.name} is not JSON: {error}", where=str(file), remedy="write the folder again"
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file.name} is not a JSON object", where=str(file), remedy="write the folder again")
    return content


def _fingerprint(content: dict[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key not in _NOT_IN_FINGERPRINT}
    canonical = json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
