"""Pre-tokenizer patterns, and where a long text can be cut without changing a single id."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

SPLIT_PATTERNS: dict[str, str] = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Published patterns that other tools recognise by their text; the gpt2 pattern is built into `ByteLevel`."""

SINGLE_SPACES = ((r"\s+", " "), (r" $", ""))
"""(pattern, replacement): white space to single spaces, none at the end; Metaspace splits at spaces only."""

PIECE_CHARS = 65_536
"""Documents longer than this are cut where that is safe; `tokenizers` has no parallelism inside a document."""

_CUT = re.compile(r"(?<=[^\W_]) ")
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}


def can_cut(content: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` gives the same ids for a text cut before a space that follows a letter or digit.

    Every pre-tokenizer listed here begins a new pre-token at that space, looks at nothing beyond it from the
    left and at nothing before it from the right; so do the normalisers. Anything else counts as unsafe.
    """
    if any(not token["special"] for token in content.get("added_tokens") or []):
        return False  # an ordinary added token may span the cut
    return _is_local(content.get("normalizer")) and _begins_at_space(content.get("pre_tokenizer"))


def cut_text(text: str, size: int = PIECE_CHARS) -> list[str]:
    """Pieces of at least `size` characters, the last excepted, each later one beginning at a safe space."""
    pieces, start = [], 0
    while len(text) - start > size:
        found = _CUT.search(text, start + size)
        if found is None:
            break
        pieces.append(text[start : found.start()])
        start = found.start()
    pieces.append(text[start:])
    return pieces


def cut_out(text: str, place: int, size: int) -> list[str]:
    """What stands before, in and after a stretch of about `size` characters from about `place` on, cut at safe spaces.

    >>> cut_out("one two three four", 3, 6)
    ['one two', ' three', ' four']
    """
    first = _CUT.search(text, place + 1)
    last = _CUT.search(text, first.start() + size) if first else None
    cuts = [0, *(found.start() for found in (first, last) if found), len(text)]
    return [text[a:b] for a, b in pairwise(cuts)]


def _is_local(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(_is_local(part) for part in normalizer["normalizers"])
    if normalizer["type"] == "Replace":
        return (normalizer["pattern"].get("Regex"), normalizer["content"]) in SINGLE_SPACES
    return normalizer["type"] in _LOCAL_NORMALIZERS


def _begins_at_space(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {"type": "BertPreTokenizer" | "WhitespaceSplit"} | {"type": "Metaspace", "split": True}:
            return True
        case {"type": "Sequence", "pretokenizers": [first, last]}:
            match first, last:
                case (
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ):
                    return pattern in SPLIT_PATTERNS.values()
    return False
