"""Segments become pairs of sentences, in the order of the text or not: pure numpy, for loader workers.

A segment comes as [CLS] text [SEP] [SEP] and leaves as [CLS] A [SEP] B [SEP]. Its text is cut at the word start that
is nearest to a place drawn at random, where the tokenizer's own words are meant. Places are drawn so that the lengths
of A and B tell nothing about the answer: cut in the middle, texts of unequal lengths would give away their exchange.

Shapes: B sequences of a micro-batch, T tokens of a sequence, P places for pairs in a sequence, R runs: all segments and
stretches of padding of a micro-batch one after another, M runs that can be cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmssl.data.batch import SequenceBatch
from lmssl.objective.masking import Draws
from lmssl.tokenizer.words import WordStarts

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NUM_SEPS = 2
"""What the data layout must put into each segment."""

_LEAST_TOKENS = 2
"""Of text, for a segment to be cut."""
_PARTS = 256
"""Of a token, in which places are drawn, so that two word starts are hardly ever equally near."""
_NO_TARGET = -100
"""`lmssl.model.head.IGNORE`, without importing torch."""


_PURPOSES = {False: "pairs", True: "pairs of evaluation"}
"""Of draws, in training and in evaluation."""


class Paired(NamedTuple):
    """A micro-batch of pairs."""

    batch: SequenceBatch
    types_BT: IntArray
    """1 for B and the [SEP] after it, else 0."""
    places_BP: IntArray
    """Where the [CLS] of a pair stands; 0 where there is no pair."""
    targets_BP: IntArray
    """0: B follows A, 1: it does not; -100 where there is no pair."""
    num_segments: int


class _Runs(NamedTuple):
    rows_R: IntArray
    begins_R: IntArray
    """Index of the first token in the whole micro-batch."""
    lengths_R: IntArray
    text_R: IntArray
    """Tokens between [CLS] and the first [SEP]; of padding negative."""
    numbers_R: npt.NDArray[np.int32]
    """As in the batch: 0 is padding."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Cuts segments into pairs, and puts one half of these out of order, by (seed, position)."""

    task: str
    """`order`: A and B are exchanged. `next`: B is that of another segment."""
    seed: int
    words: WordStarts

    @staticmethod
    def capacity(sequence_length: int) -> int:
        """Places for pairs in each row: a pair is [CLS], two sentences of a token each, and two [SEP]."""
        return sequence_length // (1 + _LEAST_TOKENS + NUM_SEPS)

    def arrange(self, batch: SequenceBatch, *, evaluation: bool) -> Paired:
        """The same rows with pairs in the place of segments: every token once, and no row longer or shorter.

        Segments of one token are left as they are, and so is, where B is to come from elsewhere, the only segment of
        a row: such have no target.
        """
        runs = _runs(batch.segments_BT)
        cut_M = np.flatnonzero(runs.text_R >= _LEAST_TOKENS)
        rows_M, draws = runs.rows_R[cut_M], Draws(self.seed, _PURPOSES[evaluation], batch.positions_B)
        if self.task == "next":
            groups_M, next_M = _groups(rows_M)
        else:
            groups_M, next_M = runs.numbers_R[cut_M].astype(np.int64), np.arange(len(cut_M))
        place_M = draws.at("cut", rows_M, groups_M) >> np.uint64(32)
        cuts_R = runs.text_R // 2
        cuts_R[cut_M] = self._cuts(batch, runs, cut_M, groups_M, place_M.astype(np.int64))
        first_R, second_R = _halves(runs, cuts_R)
        targets_R = np.full(len(runs.rows_R), _NO_TARGET)
        coin_M = draws.at(self.task, rows_M, groups_M) >> np.uint64(63) == 1
        if self.task == "order":
            swapped = cut_M[coin_M]
            first_R[swapped], second_R[swapped] = second_R[swapped], first_R[swapped]
            targets_R[cut_M] = coin_M
        else:
            alone_M = next_M == np.arange(len(cut_M))
            second_R[cut_M] = second_R[np.where(coin_M, cut_M[next_M], cut_M)]
            targets_R[cut_M] = np.where(alone_M, _NO_TARGET, coin_M)
        return _written(batch, runs, first_R, second_R, targets_R)

    def _cuts(
        self, batch: SequenceBatch, runs: _Runs, cut_M: IntArray, groups_M: IntArray, place_M: IntArray
    ) -> IntArray:
        """How many tokens A has, [M].

        In all texts that may exchange it B has as many tokens as in the others, if there are words that begin so far
        from the end of each: of these those nearest to the place drawn; else each text has its own nearest word, and
        one of a single word is cut at the place itself.

        Args:
            place_M: of the cut in the shortest text of a group, from its end, in 2^-32 of its length.
        """
        text_M, group_M = runs.text_R[cut_M], _numbered(runs.rows_R[cut_M], groups_M)
        size_G = np.bincount(group_M)
        least_G = np.full(len(size_G), np.iinfo(np.int64).max)
        np.minimum.at(least_G, group_M, text_M)
        wanted_M = _PARTS // 2 + (place_M * _PARTS * (least_G[group_M] - 1) >> 32)  # tokens of B, in parts
        number_R = np.full(len(runs.rows_R), -1)
        number_R[cut_M] = np.arange(len(cut_M))
        starts_N = np.flatnonzero(self.words.starts(batch.ids_BT, batch.segments_BT))
        run_N = np.searchsorted(runs.begins_R, starts_N, side="right") - 1
        before_N = starts_N - runs.begins_R[run_N] - 1
        inside_N = (before_N >= 1) & (before_N < runs.text_R[run_N])
        number_N, before_N = number_R[run_N[inside_N]], before_N[inside_N]
        behind_N, group_N = text_M[number_N] - before_N, group_M[number_N]
        key_N = group_N * (batch.ids_BT.shape[1] + 1) + behind_N
        shared_N = np.bincount(key_N, minlength=1)[key_N] == size_G[group_N]
        far_N = np.abs(_PARTS * behind_N - wanted_M[number_N])
        order_N = np.lexsort((far_N, ~shared_N, number_N))
        nearest = order_N[np.unique(number_N[order_N], return_index=True)[1]]
        seconds_M = (wanted_M + _PARTS // 2) // _PARTS
        seconds_M[number_N[nearest]] = behind_N[nearest]
        firsts_M: IntArray = text_M - seconds_M
        return firsts_M


def _runs(segments_BT: npt.NDArray[np.int32]) -> _Runs:
    rows, length = segments_BT.shape
    starts_BT = np.ones(segments_BT.shape, bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_R = np.flatnonzero(starts_BT)
    lengths_R = np.diff(np.append(begins_R, rows * length))
    numbers_R = segments_BT.reshape(-1)[begins_R]
    text_R = np.where(numbers_R == 0, -1, lengths_R - 1 - NUM_SEPS)
    return _Runs(begins_R // length, begins_R, lengths_R, text_R, numbers_R)


def _halves(runs: _Runs, cuts_R: IntArray) -> tuple[IntArray, IntArray]:
    """First token and length of A and of B, [R, 2] each; what cannot be cut is A alone, and padding neither."""
    text_R = np.maximum(runs.text_R, 0)
    sizes_R = np.where(text_R >= _LEAST_TOKENS, cuts_R, text_R)
    first_R = np.stack([runs.begins_R + 1, sizes_R], axis=1)
    second_R = np.stack([runs.begins_R + 1 + sizes_R, text_R - sizes_R], axis=1)
    return first_R, second_R


def _groups(rows_M: IntArray) -> tuple[IntArray, IntArray]:
    """Neighbours in a row make groups of two, the last of an odd number one of three: number, and next in it; [M].

    A coin for each group, and every pair is out of order with probability 1/2, its B always from elsewhere.
    """
    count = len(rows_M)
    begins_M = np.searchsorted(rows_M, rows_M, side="left")
    sizes_M = np.searchsorted(rows_M, rows_M, side="right") - begins_M
    inside_M = np.arange(count) - begins_M
    groups_M = np.minimum(inside_M // 2, np.maximum(sizes_M // 2 - 1, 0))
    last_M = np.ones(count, bool)
    last_M[:-1] = (rows_M[1:] != rows_M[:-1]) | (groups_M[1:] != groups_M[:-1])
    return groups_M, np.where(last_M, begins_M + 2 * groups_M, np.arange(count) + 1)


def _numbered(rows_M: IntArray, groups_M: IntArray) -> IntArray:
    """Groups of neighbours, numbered over all rows; [M]."""
    begins_M = np.zeros(len(rows_M), np.int64)
    begins_M[1:] = (rows_M[1:] != rows_M[:-1]) | (groups_M[1:] != groups_M[:-1])
    return np.cumsum(begins_M)


def _written(batch: SequenceBatch, runs: _Runs, first_R: IntArray, second_R: IntArray, targets_R: IntArray) -> Paired:
    shape, padding_R = batch.ids_BT.shape, runs.numbers_R == 0
    ends_R = runs.begins_R + runs.lengths_R
    one_R = np.where(padding_R, 0, 1)
    # [CLS], A, [SEP], B, [SEP]; padding stands in the place of [CLS].
    begins_R5 = np.stack([runs.begins_R, first_R[:, 0], ends_R - NUM_SEPS, second_R[:, 0], ends_R - 1], axis=1)
    head_R = np.where(padding_R, runs.lengths_R, 1)
    sizes_R5 = np.stack([head_R, first_R[:, 1], one_R, second_R[:, 1], one_R], axis=1)
    begins, sizes = begins_R5.reshape(-1), sizes_R5.reshape(-1)
    befores = np.cumsum(sizes) - sizes
    place_N = np.arange(batch.ids_BT.size)
    source_N = place_N + np.repeat(begins - befores, sizes)
    lengths_R = sizes_R5.sum(axis=1)
    starts_R = np.cumsum(lengths_R) - lengths_R
    offsets_N = np.where(np.repeat(padding_R, lengths_R), 0, place_N - np.repeat(starts_R, lengths_R))
    moved = replace(
        batch,
        ids_BT=batch.ids_BT.reshape(-1)[source_N].reshape(shape),
        segments_BT=np.repeat(runs.numbers_R, lengths_R).reshape(shape),
        offsets_BT=offsets_N.reshape(shape),
    )
    types_N = np.repeat(np.tile(np.array([0, 0, 0, 1, 1], np.int64), len(sizes_R5)), sizes)
    pairs = np.flatnonzero(targets_R != _NO_TARGET)
    rows = runs.rows_R[pairs]
    slots = np.arange(len(pairs)) - np.searchsorted(rows, rows, side="left")
    places_BP = np.zeros((shape[0], Pairs.capacity(shape[1])), np.int64)
    targets_BP = np.full(places_BP.shape, _NO_TARGET, np.int64)
    places_BP[rows, slots] = starts_R[pairs] - rows * shape[1]
    targets_BP[rows, slots] = targets_R[pairs]
    return Paired(moved, types_N.reshape(shape), places_BP, targets_BP, int((~padding_R).sum()))
