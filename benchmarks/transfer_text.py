"""How bench_transfer.py cuts texts."""

from __future__ import annotations

import re
from collections.abc import Iterator

PASSAGE_WORDS, SHINGLE_WORDS = 100, 8


def passages(text: str) -> Iterator[str]:
    """Runs of paragraphs of at least 100 words, cut at 120, without headings and what stands before the first."""
    words: list[str] = []
    for paragraph in text.split("\n\n")[6:]:
        if paragraph.lstrip().startswith(("#", "---", "*", "|")):
            continue
        words += re.sub(r"[_*\\]+", "", paragraph).split()
        if len(words) >= PASSAGE_WORDS:
            yield " ".join(words[: PASSAGE_WORDS * 6 // 5])
            words = []


def shingles(text: str) -> Iterator[int]:
    """Hashes of every eight words in a row."""
    words = text.lower().split()
    return (hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1))


def body_of(text: str) -> str:
    """A PEP without its header, which names the type."""
    return text.partition("\n\n")[2].strip()
