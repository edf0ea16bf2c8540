"""Results for people and for programs: tables, and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmssl.errors import EvaluationError

FILE = "evaluations.jsonl"
"""In a run folder, one result a line."""

_SHOWN = {
    "loss": ("loss", "perplexity", "bits_per_byte", "accuracy", "num_targets", "context_tokens", "stride_tokens"),
    "minimal_pairs": ("accuracy", "low", "high", "mean_accuracy", "num_asked", "num_ties"),
    "multiple_choice": ("accuracy", "low", "high", "accuracy_by_byte", "num_asked", "num_ties"),
}


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add results to a file of JSON lines, whole lines at once.

    Raises:
        EvaluationError: the file cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise EvaluationError(
            f"the results cannot be written: {error.strerror or error}", where=str(path), remedy="choose another --out"
        ) from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Results of a file, the oldest first; a line that was cut off is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines, which also cuts texts at U+2028
        try:
            yield json.loads(line)
        except ValueError:
            continue


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a table for every kind of result, one of the parts, and samples as they are."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        if kind == "samples":
            for row in of_kind:
                for sample in row.get("samples", ()):
                    console.print(f"[bold]{escape(row['name'])}[/bold]: {escape(_plain(sample['text']))}\n")
            continue
        names = _SHOWN.get(kind) or tuple(dict.fromkeys(name for row in of_kind for name in row["metrics"]))
        if kind == "loss":  # and of an objective with several tasks those that `loss` leaves out
            found = (name for row in of_kind for name in row["metrics"])
            further = [name for name in found if name.startswith("loss_") or name.endswith("_accuracy")]
            names = tuple(dict.fromkeys((*names, *further)))
        names = tuple(name for name in names if any(name in row["metrics"] for row in of_kind))
        if kind != "lm_eval":
            console.print(_table(kind, names, {row["name"]: row["metrics"] for row in of_kind}))
        for row in of_kind:
            parts = row.get("parts", {})
            if len(parts) > 1 or (parts and kind == "lm_eval"):
                of_parts = tuple(dict.fromkeys(name for part in parts.values() for name in part))
                console.print(_table(f"{row['name']} by part", of_parts, parts))


def _table(title: str, names: Sequence[str], lines: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=escape(_plain(title)), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in names:
        heading = name.removeprefix("num_").removesuffix("_tokens").replace("_", " ")
        table.add_column(escape(_plain(heading)), justify="right", overflow="fold")
    for label, metrics in lines.items():
        table.add_row(escape(_plain(label)), *(_number(metrics.get(name)) for name in names))
    return table


def _number(value: Any) -> str:
    """As people read it.

    >>> _number(12345), _number(0.51234), _number(None), _number(1234.5)
    ('12,345', '0.5123', '-', '1,234.50')
    """
    if value is None:
        return "-"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.2f}"


def _plain(text: str) -> str:
    """Text of others without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
