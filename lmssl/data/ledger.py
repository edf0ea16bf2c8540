"""The ledger: what is known of the order so far, saved with every checkpoint.

One line names the stages and the settings that the order depends on; each further line is a window. With these a
position finds its window without any text being read again.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lmssl.data.order import Stage
from lmssl.errors import CheckpointError

_FORMAT = 1


class LedgerEntry(NamedTuple):  # thousands are made when a run goes on, in half the time of a dataclass
    """One window."""

    corpus: str
    epoch: int
    window: int
    num_chunks: int
    num_sequences: int
    checksum: str
    """Of the chunks' content."""
    next_unit: int
    """Where the next window starts: rank of its unit in the epoch's permutation, and chunk of that unit."""
    next_chunk: int
    ends_epoch: bool
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_padding: int
    num_cut_documents: int
    num_bad: int
    num_dropped_short: int = 0
    num_dropped_long: int = 0
    num_dropped_duplicates: int = 0
    num_dropped_overlaps: int = 0
    sequence_length: int | None = None
    """None: `data.sequence_length`."""

    @property
    def num_dropped(self) -> int:
        """Training documents that filters left out."""
        return self.num_dropped_short + self.num_dropped_long + self.num_dropped_duplicates + self.num_dropped_overlaps


_NAMES = frozenset(LedgerEntry._fields)


class Ledger:
    """Windows in order, by corpus; entries are only ever appended."""

    def __init__(
        self,
        stages: Iterable[Stage],
        settings: Mapping[str, Any],
        files: Mapping[str, Sequence[tuple[str, int, str]]] | None = None,
    ) -> None:
        self.settings = dict(settings)
        """What the order depends on, by recipe field; compared when a run continues."""
        self.files = dict(files or {})
        """Of each corpus what tells its files from others, see `marks`; empty in ledgers of earlier versions."""
        self._entries: dict[str, list[LedgerEntry]] = {}
        self._ends: dict[str, list[int]] = {}
        self.stages = tuple(stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the order."""
        return self._stages

    @stages.setter
    def stages(self, stages: tuple[Stage, ...]) -> None:
        """Other stages: what is read of each window follows from them."""
        self._stages = stages
        for corpus, entries in self._entries.items():
            self._ends[corpus] = []
            for entry in entries:
                self._ends[corpus].append(self._end(entry))

    def entries(self, corpus: str) -> list[LedgerEntry]:
        """Windows of a corpus, in order."""
        return self._entries.get(corpus, [])

    def num_sequences(self, corpus: str) -> int:
        """Sequences of a corpus in the windows known so far."""
        ends = self._ends.get(corpus)
        return ends[-1] if ends else 0

    def append(self, entry: LedgerEntry) -> None:
        """Add the next window of a corpus."""
        end = self._end(entry)
        # Readers in other threads look at the ends first.
        self._entries.setdefault(entry.corpus, []).append(entry)
        self._ends.setdefault(entry.corpus, []).append(end)

    def find(self, corpus: str, k: int) -> tuple[int, int] | None:
        """Number of the window that holds the k-th sequence of a corpus and the index in it; None: not known yet."""
        ends = self._ends.get(corpus, [])
        number = bisect_right(ends, k)
        if number == len(ends):
            return None
        return number, k - (ends[number - 1] if number else 0)

    def read(self, corpus: str, number: int) -> range:
        """Which of a corpus's sequences are those of a window that are read: all, or the first before another length.

        What is left of a window where a stage with another length begins is repacked in the next one.
        """
        ends = self._ends[corpus]
        return range(ends[number - 1] if number else 0, ends[number])

    def is_cut(self, corpus: str, number: int) -> bool:
        """Whether some of a window is left to be repacked in the next one."""
        return len(self.read(corpus, number)) < self.entries(corpus)[number].num_sequences

    def sequence_length(self, corpus: str, k: int) -> int | None:
        """Tokens of a corpus's k-th sequence; None: `data.sequence_length`."""
        firsts, lengths = self._lengths(corpus)
        return lengths[bisect_right(firsts, k)]

    def _lengths(self, corpus: str) -> tuple[list[int], list[int | None]]:
        """Which of a corpus's sequences are the first of another length, and the lengths before and from each on."""
        firsts: list[int] = []
        lengths = [stage.sequence_length for stage in self.stages[:1]] or [None]
        for stage in self.stages[1:]:
            if stage.sequence_length != lengths[-1]:
                firsts.append(stage.first_sequences[stage.corpora.index(corpus)])
                lengths.append(stage.sequence_length)
        return firsts, lengths

    def _end(self, entry: LedgerEntry) -> int:
        """Where the part of the next window that is read ends, among the sequences of its corpus."""
        first = self.num_sequences(entry.corpus)
        if len(self._stages) < 2:
            return first + entry.num_sequences
        firsts, _ = self._lengths(entry.corpus)
        following = bisect_right(firsts, first)
        return min([first + entry.num_sequences, *firsts[following : following + 1]])

    def up_to(self, counts: Mapping[str, int]) -> Ledger:
        """The windows that hold the first `counts[corpus]` sequences of each corpus, and no more."""
        kept = Ledger(self.stages, self.settings, self.files)
        for corpus, count in counts.items():
            found = self.find(corpus, count - 1) if count else None
            for entry in self.entries(corpus)[: found[0] + 1 if found else 0]:
                kept.append(entry)
        return kept

    @property
    def fingerprint(self) -> str:
        """Equal for equal ledgers."""
        return hashlib.blake2b(self.text().encode(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        """Write JSON lines."""
        path.write_text(self.text(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or is not a ledger.
        """
        try:
            first, *lines = orjson.loads(b"[" + b",".join(path.read_bytes().splitlines()) + b"]")
            if first["format"] != _FORMAT:
                raise ValueError(f"its format is {first['format']}, this version reads {_FORMAT}")
            ledger = cls([Stage.from_json(stage) for stage in first["stages"]], first["settings"], first.get("files"))
            for line in lines:
                known = line if line.keys() <= _NAMES else {name: line[name] for name in _NAMES & line.keys()}
                ledger.append(LedgerEntry(**known))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the ledger cannot be read: {error}", where=str(path), remedy="continue from an older checkpoint"
            ) from error
        return ledger

    def text(self) -> str:
        """The JSON lines that `load` reads."""
        first = {"format": _FORMAT, "stages": [stage.to_json() for stage in self.stages], "settings": self.settings}
        if self.files:
            first["files"] = self.files
        entries = (_plain(entry) for corpus in sorted(self._entries) for entry in self._entries[corpus])
        return "".join(json.dumps(line) + "\n" for line in (first, *entries))


def _plain(entry: LedgerEntry) -> dict[str, Any]:
    return {name: value for name, value in entry._asdict().items() if value is not None}
