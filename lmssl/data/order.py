"""Position -> (corpus, k-th sequence of that corpus): seeded permutations and exact mixing, without random state.

Everything here is a pure function of its arguments. Permutations sort the raw output of Philox, which NumPy
keeps stable between releases; its shuffles are not.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from lmssl.recipe.batches import BatchPlan

IntArray = npt.NDArray[np.int64]
_KEPT_BLOCKS = 128
"""Arranged blocks in memory, 16 KiB each at the default size; arranging one takes a tenth of a millisecond."""


def permutation(count: int, *key: int | str) -> IntArray:
    """A permutation of `range(count)` fixed by the key, such as (seed, purpose, corpus, epoch)."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(source.random_raw(count), kind="stable").astype(np.int64, copy=False)


def exactly(weight: float | int) -> Fraction:
    """The weight as written: 0.7 is 7/10, not its nearest float."""
    return Fraction(repr(weight))


def integer_shares(weights: Sequence[float | int | Fraction]) -> tuple[int, ...]:
    """Integers in exactly the proportion of the weights as written."""
    exact = [weight if isinstance(weight, Fraction) else exactly(weight) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * scale) for weight in exact)


def kept_position(k: int, skip: Sequence[tuple[int, int]]) -> int:
    """The k-th position, from 0, outside the half-open ranges of `skip`, which are sorted and do not overlap."""
    position = k
    for start, end in skip:
        if position < start:
            break
        position += end - start
    return position


def end_position(batches: BatchPlan, skip: Sequence[tuple[int, int]]) -> int:
    """Where the last position that a run reads ends, those that are skipped before it counted."""
    return kept_position(batches.num_positions - 1, skip) + 1 if batches.num_positions else 0


def skipped_before(position: int, skip: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The part of `skip` below a position; ranges that touch become one, so that equal sets compare equal."""
    found: list[tuple[int, int]] = []
    for start, end in skip:
        end = min(end, position)
        if start >= end:
            break
        if found and found[-1][1] == start:
            start, _ = found.pop()
        found.append((start, end))
    return tuple(found)


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own mixture."""

    first_position: int
    corpora: tuple[str, ...]
    shares: tuple[int, ...]
    """Share of sequences per corpus, relative to their sum."""
    block_sequences: int
    """Positions per block; shares are exact up to one sequence at each block's end."""
    first_sequences: tuple[int, ...]
    """Sequences of each corpus that earlier stages consumed."""
    sequence_length: int | None = None
    """None: `data.sequence_length`."""

    def to_json(self) -> dict[str, Any]:
        """The stage as plain values; a length that is the recipe's is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stage:
        """The stage that `to_json` wrote."""
        return cls(
            first_position=values["first_position"],
            corpora=tuple(values["corpora"]),
            shares=tuple(values["shares"]),
            block_sequences=values["block_sequences"],
            first_sequences=tuple(values["first_sequences"]),
            sequence_length=values.get("sequence_length"),
        )


class Order:
    """Random access to the global order: which sequence of which corpus stands at a position."""

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        self.stages = tuple(stages)
        self._mixtures = [
            Mixture(stage.shares, stage.block_sequences, (seed, stage.first_position)) for stage in stages
        ]

    def locate(self, position: int) -> tuple[str, int]:
        """Name of the corpus at a position, and how many of its sequences come before."""
        stage, mixture = self._at(position)
        corpus, k = mixture.locate(position - stage.first_position)
        return stage.corpora[corpus], stage.first_sequences[corpus] + k

    def counts_before(self, position: int) -> dict[str, int]:
        """Sequences of each corpus among the first `position` positions."""
        stage, mixture = self._at(position)
        counts = mixture.counts_before(position - stage.first_position)
        return {
            name: first + count for name, first, count in zip(stage.corpora, stage.first_sequences, counts, strict=True)
        }

    def position_of(self, corpus: str, k: int) -> int | None:
        """The position of a corpus's k-th sequence, the inverse of `locate`; None: no stage comes to it."""
        ends = [stage.first_position for stage in self.stages[1:]] + [None]
        for stage, mixture, end in zip(self.stages, self._mixtures, ends, strict=True):
            if corpus not in stage.corpora:
                continue
            index = stage.corpora.index(corpus)
            local = mixture.position_of(index, k - stage.first_sequences[index])
            if local is not None and (end is None or stage.first_position + local < end):
                return stage.first_position + local
        return None

    def sequence_length(self, position: int) -> int | None:
        """Tokens of the sequence at a position; None: `data.sequence_length`."""
        return self._at(position)[0].sequence_length

    def in_use(self, position: int) -> set[str]:
        """Corpora with a share in the stage at a position or in the one after it."""
        number = self.stages.index(self._at(position)[0])
        return {
            name
            for stage in self.stages[number : number + 2]
            for name, share in zip(stage.corpora, stage.shares, strict=True)
            if share
        }

    def _at(self, position: int) -> tuple[Stage, Mixture]:
        # A run has a handful of stages, most have one; the last one that has begun holds the position.
        if len(self.stages) == 1:
            return self.stages[0], self._mixtures[0]
        return next(
            (stage, mixture)
            for stage, mixture in zip(reversed(self.stages), reversed(self._mixtures), strict=True)
            if stage.first_position <= position
        )


class Mixture:
    """Corpora in fixed shares: exact counts per block by nested halving, a seeded order inside the block."""

    def __init__(self, shares: Sequence[int], block_sequences: int, key: tuple[int | str, ...]) -> None:
        self._shares = tuple(shares)
        self._block_sequences = block_sequences
        self._key = key
        # Heaviest first keeps the tree balanced, which bounds the error; a corpus without a share stays out of it.
        used = [corpus for corpus, share in enumerate(shares) if share]
        self._by_weight = sorted(used, key=lambda corpus: (-shares[corpus], corpus))
        self._arranged = lru_cache(maxsize=_KEPT_BLOCKS)(self._arrange)

    def count_before(self, block: int) -> tuple[int, ...]:
        """Sequences of each corpus before a block; the sum is `block * block_sequences`."""
        counts = [0] * len(self._shares)
        self._deal(block * self._block_sequences, self._by_weight, counts)
        return tuple(counts)

    def counts_before(self, position: int) -> tuple[int, ...]:
        """Sequences of each corpus before a position."""
        block, inside = divmod(position, self._block_sequences)
        labels, _ = self._arranged(block)
        extra = np.bincount(labels[:inside], minlength=len(self._shares))
        return tuple(before + int(n) for before, n in zip(self.count_before(block), extra, strict=True))

    def locate(self, position: int) -> tuple[int, int]:
        """Index of the corpus at a position, and how many of its sequences come before."""
        if len(self._by_weight) == 1:
            return self._by_weight[0], position
        block, inside = divmod(position, self._block_sequences)
        labels, ranks = self._arranged(block)
        return int(labels[inside]), int(ranks[inside])

    def position_of(self, corpus: int, k: int) -> int | None:
        """The position of the k-th sequence of a corpus; None where it has no share or k is negative."""
        if k < 0 or not self._shares[corpus]:
            return None
        beyond = 1
        while self.count_before(beyond)[corpus] <= k:
            beyond *= 2
        block = bisect_right(range(beyond), k, key=lambda block: self.count_before(block)[corpus]) - 1
        labels, ranks = self._arranged(block)
        return block * self._block_sequences + int(np.flatnonzero((labels == corpus) & (ranks == k))[0])

    def _deal(self, count: int, corpora: list[int], counts: list[int]) -> None:
        # Rounding count * share is monotone in count, and so is what is left: no corpus ever loses a sequence.
        if len(corpora) == 1:
            counts[corpora[0]] = count
            return
        total = sum(self._shares[corpus] for corpus in corpora)
        left, weight = 1, self._shares[corpora[0]]
        while left < len(corpora) - 1 and 2 * weight < total:
            weight += self._shares[corpora[left]]
            left += 1
        first = (2 * count * weight + total) // (2 * total)
        self._deal(first, corpora[:left], counts)
        self._deal(count - first, corpora[left:], counts)

    def _arrange(self, block: int) -> tuple[IntArray, IntArray]:
        """Corpus of each position of a block, and the number of that corpus's sequences before it."""
        before, after = self.count_before(block), self.count_before(block + 1)
        labels = np.repeat(np.arange(len(before)), [b - a for a, b in zip(before, after, strict=True)])
        labels = labels[permutation(self._block_sequences, *self._key, "block", block)]
        ranks = np.empty(self._block_sequences, dtype=np.int64)
        for corpus, first in enumerate(before):
            here = np.flatnonzero(labels == corpus)
            ranks[here] = np.arange(first, first + len(here))
        return labels, ranks
