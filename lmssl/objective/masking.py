"""Which tokens are hidden from the model, and what stands in their place.

All of it is a pure function of (seed, purpose, position) and the row's own tokens: no row of a micro-batch knows of
the others, so micro-batches, world size and resuming change nothing.

Tokens are hidden in groups: single tokens, words or spans. The groups of a row are taken in a random order until
rate x (tokens that may be hidden) are targets; the group that would go beyond is taken with the probability that makes
the expected number exact. So the number of targets is bounded, and arrays of a fixed capacity hold them all.

Source: Devlin et al. 2019 (BERT) for 80/10/10, decided for each token by itself, also inside a whole word, as in its
released code. Joshi et al. 2020 (SpanBERT) for spans, whose 80/10/10 is decided once per span. Both draw a number of
targets per row, as here; the Bernoulli draws of later collators bound nothing.

Shapes: B sequences of a micro-batch, T tokens of a sequence, C places for targets in a sequence, N targets.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmssl.data.filters import mix
from lmssl.errors import TokenizerError
from lmssl.objective.needs import mask_id
from lmssl.objective.random_spans import SpanLengths, draw_spans
from lmssl.recipe.objective import Masks
from lmssl.tokenizer.load import ROLES, Tokenizer
from lmssl.tokenizer.words import WordStarts

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
HashArray = npt.NDArray[np.uint64]

_NO_TARGET = -100
"""`lmssl.model.head.IGNORE`, without importing torch."""

_PLACE_BITS = np.uint64(24)
"""Of a random key these low bits hold the place, so that no two keys of a row are equal."""

_LAST = np.uint64(2**64 - 1)
_TINY = 1e-9
"""Rounding errors of a product of rate and length are smaller."""


class Masked(NamedTuple):
    """A micro-batch with some tokens hidden."""

    ids_BT: IntArray
    """What the model reads."""
    places_BC: IntArray
    """Where in their row the targets stand, ascending; 0 where there is none."""
    targets_BC: IntArray
    """The tokens that stood there, or -100 where there is none."""


@dataclass(frozen=True, eq=False)
class Masking:
    """Hides tokens of sequences; small and picklable, for loader workers."""

    seed: int
    rate: float
    """Share of the tokens that may be hidden which are targets in training."""
    final_rate: float | None
    """The share at the end of the run; None: `rate`."""
    decay_ratio: float
    """Share of the run, at its end, over which the rate goes from `rate` to `final_rate` in a straight line."""
    num_positions: int
    """Positions of the run; beyond them `final_rate` holds."""
    evaluation_rate: float
    strategy: str
    """`token`, `whole_word` or `span`."""
    mask_share: float
    """Share of the targets in whose place the mask token stands."""
    random_share: float
    """Share in whose place a random token stands; the rest stay as they are."""
    mean_span_tokens: float
    """Mean of the geometric lengths before they are cut at `max_span_tokens`."""
    max_span_tokens: int
    max_word_tokens: int
    """Longer words, such as a run of Chinese that the tokenizer does not split, become groups of so many tokens."""
    mask_id: int
    ordinary_V: BoolArray
    """Whether a token may be hidden, and drawn as a random one; shape [tokens of the tokenizer]."""
    words: WordStarts | None = None
    """Needed by `whole_word`."""

    @classmethod
    def of(cls, section: Masks, tokenizer: Tokenizer, seed: int, num_positions: int) -> Masking:
        """The masking a recipe asks for; `num_positions` is the length of the run.

        Raises:
            TokenizerError: there is no mask token or nothing to hide, or words are asked of a tokenizer without them.
        """
        hidden, ordinary_V = mask_id(tokenizer), ordinary_tokens(tokenizer)
        if not ordinary_V.any():
            raise TokenizerError(
                "all tokens of the tokenizer are special: none can be hidden",
                where=str(tokenizer.path),
                remedy="train the tokenizer again; only control tokens should be marked special",
            )
        return cls(
            seed=seed,
            rate=section.rate,
            final_rate=section.final_rate,
            decay_ratio=section.decay_ratio,
            num_positions=num_positions,
            evaluation_rate=section.evaluation_rate,
            strategy=section.strategy,
            mask_share=section.mask_share,
            random_share=section.random_share,
            mean_span_tokens=section.mean_span_tokens,
            max_span_tokens=section.max_span_tokens,
            max_word_tokens=section.max_word_tokens,
            mask_id=hidden,
            ordinary_V=ordinary_V,
            words=WordStarts.of(tokenizer) if section.strategy == "whole_word" else None,
        )

    def rates(self, positions_B: IntArray, *, evaluation: bool) -> FloatArray:
        """The share of targets at each position; shape [B]."""
        if evaluation:
            return np.full(len(positions_B), self.evaluation_rate)
        final = self.rate if self.final_rate is None else self.final_rate
        decay = self.num_positions * self.decay_ratio
        done_B = np.clip((positions_B - (self.num_positions - decay)) / decay, 0.0, 1.0)
        rates_B: FloatArray = self.rate + (final - self.rate) * done_B
        return rates_B

    def capacity(self, sequence_length: int, evaluation: bool) -> int:
        """Places for targets in each row: at least as many as any row has, the same over the whole run."""
        rate = self.evaluation_rate if evaluation else max(self.rate, self.final_rate or 0.0)
        longest = {"token": 1, "whole_word": self.max_word_tokens, "span": self.max_span_tokens}[self.strategy]
        return min(sequence_length, math.ceil(rate * sequence_length - _TINY) + longest - 1)

    def mask(
        self, ids_BT: IntArray, segments_BT: npt.NDArray[np.int32], positions_B: IntArray, *, evaluation: bool
    ) -> Masked:
        """Hide tokens of some sequences, given their ids, segments (0: padding) and positions.

        In evaluation, positions are indices in the validation split, and the rate is `evaluation_rate`. The input
        stays as it is.
        """
        draws = Draws(self.seed, "masks of evaluation" if evaluation else "masks", positions_B)
        maskable_BT = self.ordinary_V[ids_BT] & (segments_BT != 0)
        budget_B = self.rates(positions_B, evaluation=evaluation) * maskable_BT.sum(axis=1)
        if self.strategy == "token":
            leaders_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
            chosen_BT = _choose_tokens(maskable_BT, budget_B, draws)
        else:
            starts_BT, last_BT = self._groups(ids_BT, segments_BT, maskable_BT, draws)
            leaders_BT = _leaders(starts_BT)
            chosen_BT = _choose_groups(maskable_BT, leaders_BT, last_BT, budget_B, draws)
        rows_N, places_N = np.nonzero(chosen_BT)
        capacity = self.capacity(ids_BT.shape[1], evaluation)
        places_BC = np.zeros((len(ids_BT), capacity), np.int64)
        targets_BC = np.full((len(ids_BT), capacity), _NO_TARGET, np.int64)
        num_targets_B = chosen_BT.sum(axis=1)
        slots_N = np.arange(len(rows_N)) - np.repeat(np.cumsum(num_targets_B) - num_targets_B, num_targets_B)
        places_BC[rows_N, slots_N] = places_N
        targets_BC[rows_N, slots_N] = ids_BT[rows_N, places_N]
        decided_N = leaders_BT[rows_N, places_N] if self.strategy == "span" else places_N
        hidden_BT = ids_BT.copy()
        hidden_BT[rows_N, places_N] = self._replaced(ids_BT[rows_N, places_N], rows_N, places_N, decided_N, draws)
        return Masked(hidden_BT, places_BC, targets_BC)

    def _groups(
        self, ids_BT: IntArray, segments_BT: npt.NDArray[np.int32], maskable_BT: BoolArray, draws: Draws
    ) -> tuple[BoolArray, BoolArray]:
        """Where the groups start, and which are to be taken only after all others; shape [B, T] each."""
        if self.strategy == "whole_word":
            assert self.words is not None
            starts_BT = self.words.starts(ids_BT, segments_BT)
            starts_BT[:, 0] = True
            inside_BT = np.arange(ids_BT.shape[1]) - _leaders(starts_BT)
            return starts_BT | (inside_BT % self.max_word_tokens == 0), np.zeros_like(starts_BT)
        lengths = SpanLengths(self.mean_span_tokens, self.max_span_tokens)
        num_spans = lengths.num_spans(ids_BT.shape[1])
        starts_BT, gaps_BT = draw_spans(lengths, draws.uniform("spans", num_spans + 1), ids_BT.shape[1])
        # A span ends with its segment, and at tokens that are never hidden.
        starts_BT[:, 1:] |= (segments_BT[:, 1:] != segments_BT[:, :-1]) | ~maskable_BT[:, :-1] | ~maskable_BT[:, 1:]
        starts_BT[:, 0] = True
        return starts_BT, gaps_BT

    def _replaced(
        self, ids_N: IntArray, rows_N: IntArray, places_N: IntArray, decided_N: IntArray, draws: Draws
    ) -> IntArray:
        """What stands in the place of the targets; the kind is drawn at `decided_N`, the token at `places_N`."""
        kind_N = _unit(draws.at("kinds", rows_N, decided_N))
        random = np.flatnonzero((kind_N >= self.mask_share) & (kind_N < self.mask_share + self.random_share))
        found_N = np.where(kind_N < self.mask_share, self.mask_id, ids_N)
        ordinary = np.flatnonzero(self.ordinary_V)
        high = draws.at("tokens", rows_N[random], places_N[random]) >> np.uint64(32)
        found_N[random] = ordinary[(high * np.uint64(len(ordinary)) >> np.uint64(32)).astype(np.int64)]
        return found_N


def ordinary_tokens(tokenizer: Tokenizer) -> BoolArray:
    """Which ids are tokens of text: in the vocabulary, not special, no control token; shape [tokenizer.num_tokens]."""
    ordinary_V = np.zeros(tokenizer.num_tokens, bool)
    ordinary_V[list(tokenizer.backend.get_vocab(with_added_tokens=True).values())] = True
    for token, added in tokenizer.backend.get_added_tokens_decoder().items():
        ordinary_V[token] &= not added.special
    control = (getattr(tokenizer, f"{role}_id") for role in ROLES)
    ordinary_V[[token for token in control if token is not None]] = False
    return ordinary_V


class Draws:
    """Random numbers by (seed, purpose, position), what for, and number: a hash of them all, hence no state.

    Each position and use has a splitmix64 sequence that starts at a hash of its own.
    """

    def __init__(self, seed: int, purpose: str, positions_B: IntArray) -> None:
        self._key = (seed, purpose)
        self._positions_B = mix(positions_B.astype(np.uint64))

    def bits(self, use: str, count: int) -> HashArray:
        """64 random bits each; shape [B, count]."""
        return mix(self._first_B(use)[:, None] + _STEP * np.arange(count, dtype=np.uint64))

    def at(self, use: str, rows_N: IntArray, numbers_N: IntArray) -> HashArray:
        """Some of the `bits`, by row and number."""
        return mix(self._first_B(use)[rows_N] + _STEP * numbers_N.astype(np.uint64))

    def uniform(self, use: str, count: int) -> FloatArray:
        """Uniform in [0, 1); shape [B, count]."""
        return _unit(self.bits(use, count))

    def _first_B(self, use: str) -> HashArray:
        digest = hashlib.blake2b(json.dumps([*self._key, use]).encode(), digest_size=8).digest()
        return mix(self._positions_B ^ np.uint64(int.from_bytes(digest, "little")))


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _unit(bits: HashArray) -> FloatArray:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keys(draws: Draws, length: int) -> HashArray:
    """Random keys, all different within a row, whose low bits are their place; the highest bit is 0. [B, T]"""
    low = np.arange(length, dtype=np.uint64)
    return (draws.bits("order", length) >> np.uint64(1)) >> _PLACE_BITS << _PLACE_BITS | low


def _choose_tokens(maskable_BT: BoolArray, budget_B: FloatArray, draws: Draws) -> BoolArray:
    """Of each row's maskable tokens as many as its budget says, rounded at random: all subsets are as likely."""
    keys_BT = np.where(maskable_BT, _keys(draws, maskable_BT.shape[1]), _LAST)
    whole_B = np.floor(budget_B + _TINY)
    count_B = whole_B.astype(np.int64) + (draws.uniform("rounding", 1)[:, 0] < budget_B - whole_B)
    sorted_BT = np.sort(keys_BT, axis=1)
    highest_B = sorted_BT[np.arange(len(count_B)), np.maximum(count_B - 1, 0)]
    return (keys_BT <= highest_B[:, None]) & (count_B > 0)[:, None]


def _choose_groups(
    maskable_BT: BoolArray, leaders_BT: IntArray, last_BT: BoolArray, budget_B: FloatArray, draws: Draws
) -> BoolArray:
    """Groups in random order up to the budget of their row; shape [B, T]. Those marked `last` come after all others."""
    num_rows, length = maskable_BT.shape
    rows_B1 = np.arange(num_rows)[:, None]
    cells_BT = rows_B1 * length + leaders_BT
    sizes_BT = np.bincount(cells_BT[maskable_BT], minlength=num_rows * length).reshape(num_rows, length)
    keys_BT = _keys(draws, length) | last_BT.astype(np.uint64) << np.uint64(63)
    order_BT = np.sort(np.where(sizes_BT > 0, keys_BT, _LAST), axis=1)
    filled_BT = order_BT != _LAST
    places_BT = np.where(filled_BT, order_BT & ((np.uint64(1) << _PLACE_BITS) - np.uint64(1)), 0).astype(np.int64)
    ordered_BT = np.where(filled_BT, sizes_BT[rows_B1, places_BT], 0)
    after_BT = np.cumsum(ordered_BT, axis=1)
    room_BT = budget_B[:, None] - (after_BT - ordered_BT)
    fits_BT = ordered_BT <= room_BT + _TINY
    crosses_BT = (room_BT > _TINY) & (draws.uniform("rounding", 1) * ordered_BT < room_BT)
    rows, slots = np.nonzero(filled_BT & (fits_BT | crosses_BT))
    taken_BT = np.zeros_like(maskable_BT)
    taken_BT[rows, places_BT[rows, slots]] = True
    return taken_BT[rows_B1, leaders_BT] & maskable_BT


def _leaders(starts_BT: BoolArray) -> IntArray:
    """The place at which each token's group starts; every row's first token starts one."""
    return np.maximum.accumulate(np.where(starts_BT, np.arange(starts_BT.shape[1]), 0), axis=1)
