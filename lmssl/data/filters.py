"""Which documents of a chunk are trained on: the split, length limits, overlaps with evaluation text, duplicates.

Filters concern training only; held-out documents are neither dropped nor counted. A document that several filters
would drop is counted once, by the first of: overlap, too short, too long, duplicate. So a duplicate is a text of
which an earlier copy was kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmssl.data.chunk import Chunk
from lmssl.data.columns import stored_array
from lmssl.errors import DataError
from lmssl.recipe.data import FiltersSection

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Filters:
    """Which training documents are dropped; None and False are off."""

    min_tokens: int | None = None
    """Content tokens of a document as the cache holds it: a section of a cut text is a document."""
    max_tokens: int | None = None
    drop_duplicates: bool = False
    overlap_column: str | None = None
    """File in a chunk's folder that says which documents overlap evaluation text."""

    @classmethod
    def of(cls, section: FiltersSection, overlap_column: str | None) -> Filters:
        """The filters a recipe asks for."""
        return cls(section.min_tokens, section.max_tokens, section.drop_duplicates, overlap_column)


@dataclass(frozen=True)
class Dropped:
    """Training documents that filters dropped, by reason."""

    num_dropped_short: int = 0
    num_dropped_long: int = 0
    num_dropped_duplicates: int = 0
    num_dropped_overlaps: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Candidates:
    """A chunk's documents before duplicates are dropped."""

    rows: npt.NDArray[Any]
    """Shape [documents] of `cache.DOCUMENT_FIELDS`."""
    begins: IntArray
    """Shape [documents]: first token."""
    lengths: IntArray
    """Shape [documents]: content tokens."""
    kept: BoolArray
    """Shape [documents]."""
    dropped: Dropped = field(default_factory=Dropped)


def training_documents(chunk: Chunk, filters: Filters, seed: int, held_out_ratio: float) -> Candidates:
    """The documents of a chunk that are trained on unless they are duplicates.

    Raises:
        DataError: the chunk's column of overlaps is missing or damaged.
    """
    found = documents_of(chunk, seed, held_out_ratio, held_out=False)
    if filters.overlap_column is None and filters.min_tokens is None and filters.max_tokens is None:
        return found
    kept, counts = found.kept, []
    short = found.lengths < (filters.min_tokens or 0)
    long = found.lengths > filters.max_tokens if filters.max_tokens is not None else np.zeros_like(short)
    for unwanted in (_overlaps(chunk, filters.overlap_column), short, long):
        counts.append(int((kept & unwanted).sum()))
        kept = kept & ~unwanted
    dropped = Dropped(num_dropped_overlaps=counts[0], num_dropped_short=counts[1], num_dropped_long=counts[2])
    return Candidates(found.rows, found.begins, found.lengths, kept, dropped)


def documents_of(chunk: Chunk, seed: int, held_out_ratio: float, *, held_out: bool) -> Candidates:
    """The documents of one side of the split, unfiltered."""
    ends, rows = chunk.ends().astype(np.int64), chunk.documents()
    begins = np.append(0, ends[:-1]) if len(ends) else ends
    kept = is_held_out(rows["text_hash"], seed, held_out_ratio) == held_out
    return Candidates(rows, begins, ends - begins, kept)


class SeenTexts:
    """The texts an epoch has shown so far; 8 bytes for each distinct one, and as much again while runs are merged."""

    def __init__(self) -> None:
        self._runs: list[HashArray] = []  # sorted, disjoint, each more than twice as long as the next

    def add(self, text_hashes: HashArray) -> BoolArray:
        """Which texts came before, here or in an earlier call; shape [documents]. All are remembered."""
        firsts = np.zeros(len(text_hashes), bool)
        distinct, at = np.unique(text_hashes, return_index=True)  # the index of the first of equals
        new = np.ones(len(distinct), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            new &= run[place] != distinct
        firsts[at[new]] = True
        if new.any():
            self._runs.append(distinct[new])
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return ~firsts


def window_duplicates(
    chunks: Sequence[Chunk], filters: Filters, seed: int, held_out_ratio: float, seen: SeenTexts
) -> IntArray:
    """The documents of a window whose text came before in the epoch; `seen` learns the others.

    Documents count through the window's chunks, those dropped for other reasons included; shape [duplicates].
    """
    found = [training_documents(chunk, filters, seed, held_out_ratio) for chunk in chunks]
    kept = np.flatnonzero(np.concatenate([candidates.kept for candidates in found]))
    hashes = np.concatenate([candidates.rows["text_hash"] for candidates in found])
    return kept[seen.add(hashes[kept])]


def duplicates_name(checksums: Sequence[str], filters: Filters, seed: int, held_out_ratio: float) -> str:
    """Names the duplicates of an epoch's last window; `checksums` are those of its windows from the first on."""
    what = [filters.min_tokens, filters.max_tokens, filters.overlap_column, seed, held_out_ratio]
    return hashlib.blake2b(json.dumps([what, list(checksums)]).encode(), digest_size=16).hexdigest()


def read_duplicates(path: Path) -> IntArray:
    """What `window_duplicates` found, as the cache keeps it.

    Raises:
        DataError: the file is missing or damaged.
    """
    found = stored_array(path)
    if found is None:
        raise _vanished(path)
    return found.astype(np.int64)


def is_held_out(text_hashes: HashArray, seed: int, ratio: float) -> BoolArray:
    """Which documents belong to the validation split; equal texts share a side."""
    mixed = mix(text_hashes ^ mix(np.array([seed % (1 << 64)], dtype=np.uint64)))
    return (mixed >> np.uint64(11)) < ratio * 2.0**53


def mix(values: HashArray) -> HashArray:
    """Scrambled values: the finaliser of splitmix64.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _overlaps(chunk: Chunk, column: str | None) -> BoolArray:
    if column is None:
        return np.zeros(chunk.meta.num_documents, bool)
    found = stored_array(chunk.path / column)
    if found is None or len(found) != chunk.meta.num_documents:
        raise _vanished(chunk.path / column)
    return found.astype(bool)


def _vanished(path: Path) -> DataError:
    return DataError(
        "a file of the token cache was removed or damaged during the run",
        where=str(path),
        remedy="run the same command again: it is rebuilt and the run continues from its last checkpoint",
    )
