"""Pre-tokenizer patterns, and where a long text can be cut without changing a single id."""

from __future__ import annotations

import re
from collections.abc import Iterator
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

PIECE_BYTES = 65_536
"""Documents longer than this are cut where that is safe; `tokenizers` has no parallelism inside a document."""

_SPACE = re.compile(rb"(?<=[A-Za-z0-9\x80-\xbf]) ")
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}


def can_cut(content: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` gives the same ids for a text cut before a space that follows a letter or digit.

    Every pre-tokenizer listed here begins a new pre-token at that space, looks at nothing beyond it from the
    left and at nothing before it from the right; so do the normalisers. Anything else counts as unsafe.
    """
    if any(not token["special"] for token in content.get("added_tokens") or []):
        return False  # an ordinary added token may span the cut
    return _is_local(content.get("normalizer")) and _begins_at_space(content.get("pre_tokenizer"))


def cut_text(raw: bytes, size: int) -> Iterator[bytes]:
    """Pieces of UTF-8 of at least `size` bytes, the last excepted, each later one beginning at a safe space."""
    start = 0
    while len(raw) - start > size:
        end = _safe_space(raw, start + size)
        if end is None:
            break
        yield raw[start:end]
        start = end
    yield raw[start:]


def cut_out(raw: bytes, place: int, size: int) -> list[bytes]:
    """What stands before, in and after a stretch of about `size` bytes from about `place` on, cut at safe spaces.

    >>> cut_out(b"one two three four", 3, 6)
    [b'one two', b' three', b' four']
    """
    first = _safe_space(raw, place + 1)
    last = _safe_space(raw, first + size) if first is not None else None
    cuts = [0, *(cut for cut in (first, last) if cut is not None), len(raw)]
    return [raw[a:b] for a, b in pairwise(cuts)]


def _safe_space(raw: bytes, start: int) -> int | None:
    """The first space from `start` on that follows a letter or digit."""
    while found := _SPACE.search(raw, start):
        space = found.start()
        if raw[space - 1] < 0x80 or raw[max(0, space - 4) : space].decode(errors="ignore")[-1].isalnum():
            return space
        start = space + 1
    return None


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
