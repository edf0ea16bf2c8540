"""What tables of several benchmarks share."""

from __future__ import annotations

import statistics
from typing import Any


def spread(values: list[float], form: str) -> str:
    """Median with minimum and maximum."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def where(record: dict[str, Any]) -> str:
    """One line about date, machine and command."""
    machine = record["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "transformers", "accelerate", "tokenizers"))
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    bf16 = machine.get("bf16")
    kind = "" if bf16 is None else f", {', '.join(bf16)}" if bf16 else ", without instructions for bf16"
    return (
        f"{record['date']}; {machine['cpu']}, {machine['cores']} cores{kind}{threads}; "
        f"Python {machine['python']}, {versions}.\n"
        f"Reproduce: `{record['command']}`\n"
    )
