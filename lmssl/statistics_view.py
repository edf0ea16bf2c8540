"""The statistics of an epoch as people read them: one view, in the terminal and on a page."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from lmssl.data.statistics import Statistics
from lmssl.errors import LmsslError

_BAR_WIDTH = 40
_PAGE_WIDTH = 10_000  # a page scrolls, so nothing on it is shortened
_COLOURS = [(27, 31, 36), (207, 34, 46), (17, 99, 41), (154, 103, 0), (9, 105, 218), (130, 80, 223), (27, 124, 131)]
_LIGHT = TerminalTheme((255, 255, 255), (27, 31, 36), [*_COLOURS, (110, 119, 129)])
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: {foreground}; background: {background}; }}
h1 {{ font: 600 1.25rem system-ui, sans-serif; }}
pre {{ font: 0.875rem/1.3 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto; }}
{stylesheet}
</style>
</head>
<body>
<h1>$title</h1>
<pre>{code}</pre>
</body>
</html>
"""


def print_statistics(found: Mapping[str, Statistics], out: Console) -> None:
    """A table with a column per corpus, and under it their documents by length; several corpora also in total."""
    columns = list(found.items())
    if len(found) > 1:
        columns.append(("total", sum(found.values(), Statistics())))
    if not out.is_terminal:
        out.width = max(out.width, 20 * (1 + len(columns)))  # a file has room for every column
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("first epoch")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for cells in zip(*(_rows(counts) for _, counts in columns), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    out.print(table)
    labels = [_label(fewest, most) for _, counts in columns for fewest, most, _ in counts.bins()]
    width = max(map(len, ["tokens", *labels]))
    for name, counts in columns:
        for line in _bars("" if len(columns) == 1 else f", {name}", counts, width):
            out.print(line, soft_wrap=True)


def check_page(path: Path) -> None:
    """Refuse a page that cannot be written, before there is anything to write; nothing is left behind.

    Raises:
        LmsslError: there is no such folder, it takes no files, or the path is something else than a file.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise _unwritable(path, "it is not a file")
    try:
        _partial(target).touch()
        _partial(target).unlink()
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def write_page(found: Mapping[str, Statistics], title: str, path: Path) -> None:
    """What `print_statistics` prints as one HTML file that needs no other; it replaces an older one in one go.

    Raises:
        LmsslError: the file cannot be written.
    """
    console = Console(record=True, file=io.StringIO(), width=_PAGE_WIDTH, highlight=False)
    print_statistics(found, console)
    shown = html.escape(title).replace("{", "{{").replace("}", "}}")
    page = console.export_html(theme=_LIGHT, code_format=_PAGE.replace("$title", shown))
    target = path.resolve()
    try:
        _partial(target).write_text(page, encoding="utf-8")
        _partial(target).replace(target)
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _partial(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def _unwritable(path: Path, why: str | None) -> LmsslError:
    return LmsslError(f"the page cannot be written: {why}", where=str(path), remedy="choose another --html")


def _rows(counts: Statistics) -> Iterator[tuple[str, str]]:
    ratio = counts.bytes_per_token
    yield "documents", f"{counts.num_documents:,}"
    yield "tokens", f"{counts.num_tokens:,}"
    yield "bytes of text", "unknown" if ratio is None else f"{counts.num_bytes:,}"
    yield "bytes per token", "unknown" if ratio is None else f"{ratio:.3f}"
    yield "sequences", f"{counts.num_sequences:,}"
    yield "padding", f"{counts.padding_ratio:.3%}"
    yield "cut documents", f"{counts.num_cut_documents:,} ({counts.cut_documents_ratio:.2%})"
    yield "held-out documents", f"{counts.num_held_out_documents:,}"
    yield "dropped documents", f"{counts.num_dropped_documents:,}"
    yield "  too short", f"{counts.num_dropped_short:,}"
    yield "  too long", f"{counts.num_dropped_long:,}"
    yield "  duplicates", f"{counts.num_dropped_duplicates:,}"
    yield "  evaluation text", f"{counts.num_dropped_overlaps:,}"
    yield "empty documents", f"{counts.num_empty_documents:,}"
    yield "bad records", f"{counts.num_bad_records:,}"


def _bars(whose: str, counts: Statistics, width: int) -> Iterator[Text]:
    """Documents by length under an empty line, one bar per bin; labels take `width` cells."""
    bins = counts.bins()
    if not bins:
        return
    highest = max(count for _, _, count in bins)
    yield Text()
    yield Text(f"{'tokens':>{width}}  documents{whose}", "bold")
    for fewest, most, count in bins:
        bar = "█" * round(_BAR_WIDTH * count / highest) or ("▏" if count else "")
        yield Text.assemble(f"{_label(fewest, most):>{width}}  ", (bar, "cyan"), f" {count:,}")


def _label(fewest: int, most: int) -> str:
    return f"{fewest:,} - {most:,}"
