"""What a run left out of the text it has read, listed beside it: bad records, and documents with evaluation text.

The lists cover the windows that the run has begun to read. Those of a corpus's first epoch are all there are to list:
later epochs read the same text again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmssl.data.chunk import read_chunk
from lmssl.data.ledger import LedgerEntry
from lmssl.data.overlaps import dropped_overlaps
from lmssl.data.stream import SequenceStream

_LISTS = {
    "bad_records.jsonl": ("num_bad", "bad records are listed"),
    "dropped_overlaps.jsonl": (
        "num_dropped_overlaps",
        "documents dropped because they contain evaluation text are listed",
    ),
}
"""By file: what the ledger counts its lines under, and what is said of them at the end."""
_Key = tuple[str, str, int, int]


class SetAside:
    """The lists in a run's folder; each line stands once, whatever the run was interrupted by."""

    def __init__(self, run: Path, stream: SequenceStream, position: int) -> None:
        """Continue the lists of a run that has read its first `position` positions."""
        self._stream = stream
        entries = self._first_epochs(position)
        self._lists = {}
        for name, (count, _) in _LISTS.items():
            rows = _read(run / name)
            # A list that lacks lines, because it is gone or could not be written, is made anew.
            whole = len(rows) >= sum(getattr(entry, count) for found in entries.values() for entry in found)
            windows = {corpus: len(found) if whole else 0 for corpus, found in entries.items()}
            self._lists[name] = _List(run / name, rows, windows)

    def write(self, position: int) -> None:
        """Add what the windows up to a position left out; a list without lines is no file.

        Raises:
            DataError: the text of a window is no longer what it was.
            OSError: a list cannot be written.
        """
        entries = self._first_epochs(position)
        for name, held in self._lists.items():
            find = self._bad_records if name == "bad_records.jsonl" else self._dropped_overlaps
            for corpus, number in held.windows.items():
                for entry in entries[corpus][number:]:
                    if getattr(entry, _LISTS[name][0]):
                        held.rows.update((_key(row), row) for row in find(corpus, held.windows[corpus]))
                    held.windows[corpus] += 1
            held.write()

    def notes(self) -> list[str]:
        """Where what is listed, for the end of a run."""
        return [
            f"{len(held.rows):,} {_LISTS[name][1]} in {held.path}" for name, held in self._lists.items() if held.rows
        ]

    def _first_epochs(self, position: int) -> dict[str, list[LedgerEntry]]:
        ledger = self._stream.ledger_at(position)
        names = [corpus.name for corpus in self._stream.section.mixture]
        return {name: [entry for entry in ledger.entries(name) if entry.epoch == 0] for name in names}

    def _bad_records(self, corpus: str, number: int) -> Iterator[dict[str, Any]]:
        for file, bad in self._stream.bad_records(corpus, number):
            yield {"corpus": corpus, "file": file, "record": bad.number, "start": bad.start, "reason": bad.reason}

    def _dropped_overlaps(self, corpus: str, number: int) -> Iterator[dict[str, Any]]:
        layout = self._stream.layout
        for path in self._stream.plan(corpus, number).chunks:
            chunk = read_chunk(path)
            if chunk is not None and layout.filters.overlap_column is not None:
                found = dropped_overlaps(chunk, layout.filters.overlap_column, layout.seed, layout.held_out_ratio)
                yield from ({"corpus": corpus, **row} for row in found)


class _List:
    def __init__(self, path: Path, rows: dict[_Key, dict[str, Any]], windows: dict[str, int]) -> None:
        self.path = path
        self.rows = rows
        self.windows = windows
        """Of each corpus, those that are listed."""
        self._num_written = len(rows)

    def write(self) -> None:
        if len(self.rows) == self._num_written:
            return
        lines = (json.dumps(self.rows[key]) + "\n" for key in sorted(self.rows))
        partial = self.path.with_name(f".tmp-{self.path.name}")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self.path)
        self._num_written = len(self.rows)


def _key(row: dict[str, Any]) -> _Key:
    return row["corpus"], row["file"], row["start"], row.get("offset", 0)


def _read(path: Path) -> dict[_Key, dict[str, Any]]:
    """The lines of a list by their place; none where it is missing or not what `SetAside` writes."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {_key(row): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
