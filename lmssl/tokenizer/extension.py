"""Tokenizers that know more tokens than another, at the same ids: how to see it, and how to make one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What an extended folder takes from the one it extends."""


@dataclass(frozen=True)
class NewToken:
    """A token that the older tokenizer lacks."""

    id: int
    text: str
    parts: tuple[int, ...]
    """Ids that the older tokenizer gives for its text; empty for control tokens, whose text means nothing to it."""


def new_tokens(old: Tokenizer, new: Tokenizer) -> list[NewToken]:
    """The tokens by which `new` extends `old`, in the order of ids.

    Raises:
        TokenizerError: `new` is no extension; names the first token that has another id or is missing.
    """
    before = old.backend.get_vocab(with_added_tokens=True)
    after = new.backend.get_vocab(with_added_tokens=True)
    for text, number in sorted(before.items(), key=lambda item: item[1]):
        found = after.get(text)
        if found != number:
            there = "is not in it" if found is None else f"is {found} in it"
            raise TokenizerError(
                f"this is not the model's tokenizer, nor one that extends it: token {text!r} is {number} for the "
                f"model and {there}",
                where=str(new.path),
                remedy=f"use the model's own tokenizer, {old.path}, or extend that one: lmssl extend-tokenizer",
            )
    control = {number for number, token in new.backend.get_added_tokens_decoder().items() if token.special}
    known = set(before.values())
    return [
        NewToken(number, text, () if number in control else _parts(old, new, number, text))
        for text, number in sorted(after.items(), key=lambda item: item[1])
        if number not in known
    ]


def extend_tokenizer(path: Path, out: Path, *, tokens: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """Write a copy of a tokenizer folder that knows further tokens, at the ids after its last.

    Args:
        tokens: found wherever they stand in a text, before the tokenizer's own rules.
        special: control tokens, which no text gives.
    Raises:
        TokenizerError: no tokenizer there, `out` is taken, nothing to add, or a token that exists or is given twice.
    """
    old = load_tokenizer(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenizerError("the output exists and is not empty", where=str(out), remedy="choose another folder")
    if not tokens and not special:
        raise TokenizerError("there is nothing to add", where=str(path), remedy="give --token or --special")
    known = set(old.backend.get_vocab(with_added_tokens=True))
    for token in (*special, *tokens):
        if token in known or not token.strip():
            what = f"the tokenizer has {token!r} already" if token in known else f"{token!r} is no text"
            raise TokenizerError(what, where=str(path), remedy="leave it out")
        known.add(token)
    extended = tokenizers.Tokenizer.from_str(old.backend.to_str())
    extended.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    extended.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in tokens])
    temporary = out.parent / f".tmp-{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in FILES[1:]:
        if (old.path / name).exists():
            shutil.copyfile(old.path / name, temporary / name)
    content = json.dumps(json.loads(extended.to_str()), ensure_ascii=False, indent=1) + "\n"
    (temporary / FILES[0]).write_text(content, encoding="utf-8")
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    return load_tokenizer(out)


def _parts(old: Tokenizer, new: Tokenizer, number: int, text: str) -> tuple[int, ...]:
    """What the older tokenizer makes of a token's text; of a piece inside a word, without the mark that says so."""
    written = str(new.backend.decode([number], skip_special_tokens=False)) or text
    written = written.removeprefix("##") if text.startswith("##") else written
    return tuple(old.backend.encode(written, add_special_tokens=False).ids)
