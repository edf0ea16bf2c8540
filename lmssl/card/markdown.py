"""Text of others in Markdown: names and recipes stay what they are, and never become links, tables or headings."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#|!~$&])")


def escaped(text: object) -> str:
    """Text on one line whose signs mean nothing.

    >>> escaped("a|b [x](http://y)")
    'a\\\\|b \\\\[x\\\\]\\\\(http://y\\\\)'
    """
    line = "".join(character if character.isprintable() else " " for character in str(text))
    return _SPECIAL.sub(r"\\\1", line)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of escaped cells."""
    lines = [head, ["---"] * len(head), *[[escaped(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
