"""Position -> (corpus, k-th sequence of that corpus): seeded permutations and exact mixing, without random state.

Everything here is a pure function of its arguments. Permutations sort the raw output of Philox, which NumPy
keeps stable between releases; its shuffles are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def permutation(count: int, *key: int | str) -> IntArray:
    """A permutation of `range(count)` fixed by the key, such as (seed, purpose, corpus, epoch)."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(source.random_raw(count), kind="stable").astype(np.int64, copy=False)


def integer_shares(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Integers in exactly the proportion of the weights as written: 0.7 is 7/10, not its nearest float."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * scale) for weight in exact)


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

    def to_json(self) -> dict[str, Any]:
        """The stage as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stage:
        """The stage that `to_json` wrote."""
        return cls(
            first_position=values["first_position"],
            corpora=tuple(values["corpora"]),
            shares=tuple(values["shares"]),
            block_sequences=values["block_sequences"],
            first_sequences=tuple(values["first_sequences"]),
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

    def _at(self, position: int) -> tuple[Stage, Mixture]:
        # A run has a handful of stages; the last one that has begun holds the position.
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
        # Heaviest first keeps the tree balanced, which bounds the error.
        self._by_weight = sorted(range(len(shares)), key=lambda corpus: (-shares[corpus], corpus))
        self._arranged = lru_cache(maxsize=8)(self._arrange)

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
        block, inside = divmod(position, self._block_sequences)
        labels, ranks = self._arranged(block)
        return int(labels[inside]), int(ranks[inside])

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
