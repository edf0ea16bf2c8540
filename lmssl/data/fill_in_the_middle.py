"""Documents whose middle stands at their end, marked by three sentinels; no document is ever built as a whole.

Source: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle": document level, cuts
between tokens, and for suffix-first documents the order of its SPM "variant 2".

Of n content tokens with cuts a <= b, prefix-first (PSM) makes `PRE [0,a) SUF [b,n) MID [a,b)`, and suffix-first (SPM)
`PRE SUF [b,n) MID [0,a) [a,b)`. Bos and eos stay outside.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmssl.data.filters import HashArray, IntArray, mix
from lmssl.errors import DataError
from lmssl.recipe.data import FillInTheMiddleSection
from lmssl.tokenizer.load import Tokenizer

NUM_SENTINELS = 3
Pieces = tuple[IntArray, IntArray, IntArray]
"""First and one past the last token of a document, and where in the row the first one goes; shape [pieces] each."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """How many documents are rearranged, and the ids that mark their parts."""

    rate: float
    spm_rate: float
    """Share of the rearranged documents that begin with the suffix."""
    prefix_id: int
    middle_id: int
    suffix_id: int

    @classmethod
    def of(cls, section: FillInTheMiddleSection, tokenizer: Tokenizer) -> FillInTheMiddle:
        """The transform a recipe asks for.

        Raises:
            DataError: a sentinel is not a token of the tokenizer, or two are the same.
        """
        ids: dict[str, int] = {}
        for role in ("prefix", "middle", "suffix"):
            token = getattr(section, role)
            found = tokenizer.backend.token_to_id(token)
            if found is None:
                raise DataError(
                    f"data.fill_in_the_middle.{role} is {token!r}, and the tokenizer has no such token",
                    where=str(tokenizer.path),
                    remedy=f"name the tokenizer's own token in data.fill_in_the_middle.{role}, or add all three: "
                    f"lmssl extend-tokenizer {tokenizer.path} --out FOLDER --special '{section.prefix}' "
                    f"--special '{section.middle}' --special '{section.suffix}', then tokenizer.path=FOLDER",
                )
            ids[role] = found
        if len(set(ids.values())) < len(ids):
            raise DataError(
                f"the sentinels {section.prefix!r}, {section.middle!r} and {section.suffix!r} are not three tokens",
                where="data.fill_in_the_middle",
                remedy="name a token of its own for each of prefix, middle and suffix",
            )
        return cls(section.rate, section.spm_rate, ids["prefix"], ids["middle"], ids["suffix"])


def document_ids(rows: npt.NDArray[Any]) -> HashArray:
    """One number per row of `cache.DOCUMENT_FIELDS`: of its text's hash, where its record starts in the source, and
    where the document starts in the record; not of the file, the chunk or the epoch. Shape [documents].
    """
    found = mix(rows["text_hash"])
    for column in ("start", "offset"):
        found = mix(found ^ rows[column].astype(np.uint64))
    return found


class Middles:
    """Which documents of a window are rearranged, and where they are cut.

    Whether and how is keyed by (seed, document), so lengths are the same in every epoch; cuts are keyed by the
    epoch as well, each uniform over the n + 1 places around n tokens.
    """

    def __init__(
        self, transform: FillInTheMiddle, seed: int, epoch: int, documents: HashArray, num_tokens: IntArray
    ) -> None:
        self._transform = transform
        self._num_tokens = num_tokens
        self.chosen = (_uniform(documents, seed, "chosen") < transform.rate) & (num_tokens > 0)
        """Shape [documents]: it is rearranged, and three tokens longer; documents without tokens never are."""
        self._suffix_first = _uniform(documents, seed, "suffix first") < transform.spm_rate
        drawn = [_uniform(documents, seed, "cut", i, epoch) for i in (0, 1)]
        cuts = [np.minimum((draw * (num_tokens + 1)).astype(np.int64), num_tokens) for draw in drawn]
        self._a, self._b = np.minimum(*cuts), np.maximum(*cuts)

    def write(self, documents: IntArray, pieces: Pieces, ids_T: IntArray) -> tuple[IntArray, Pieces]:
        """Put the sentinels of a row's segments in place; what stands between them is returned as pieces to copy.

        documents: shape [segments]; pieces: of each segment, counted in the rearranged document's content.
        Returns the segment of each piece, and pieces counted in the document as it is cached.
        """
        chosen = self.chosen[documents]
        if not chosen.any():
            return np.arange(len(documents)), pieces
        plain, moved = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        first, last, to = (part[moved, None] for part in pieces)
        marks, begins, lengths, sources = self._arrange(documents[moved])
        ids = np.array([self._transform.prefix_id, self._transform.suffix_id, self._transform.middle_id])
        inside = (first <= marks) & (marks < last)
        ids_T[(to + marks - first)[inside]] = np.broadcast_to(ids, marks.shape)[inside]
        low, high = np.maximum(first, begins), np.minimum(last, begins + lengths)
        some = low < high
        shift = sources - begins
        runs = ((low + shift)[some], (high + shift)[some], (to + low - first)[some])
        which = np.concatenate([plain, np.broadcast_to(moved[:, None], some.shape)[some]])
        first, last, to = (np.concatenate([part[plain], run]) for part, run in zip(pieces, runs, strict=True))
        return which, (first, last, to)

    def spans(self, documents: IntArray, firsts: IntArray, stops: IntArray) -> tuple[IntArray, IntArray]:
        """From which to which token of a cached document its rearranged content from `firsts` to `stops` reaches."""
        chosen = np.flatnonzero(self.chosen[documents])
        _, begins, lengths, sources = self._arrange(documents[chosen])
        low = np.maximum(firsts[chosen, None], begins) + sources - begins
        high = np.minimum(stops[chosen, None], begins + lengths) + sources - begins
        some = low < high
        firsts, stops = firsts.copy(), stops.copy()
        highest = np.where(some, high, 0).max(axis=1)
        firsts[chosen] = np.minimum(np.where(some, low, self._num_tokens[documents[chosen], None]).min(axis=1), highest)
        stops[chosen] = highest
        return firsts, stops

    def _arrange(self, documents: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Places of PRE, SUF, MID, and of three runs of tokens place, length and source; shape [documents, 3] each."""
        a, b, n = self._a[documents], self._b[documents], self._num_tokens[documents]
        zero = np.zeros_like(a)
        # Suffix first, the prefix stands directly before the middle: nothing after PRE, one run [0, b) after MID.
        head = np.where(self._suffix_first[documents], 0, a)
        marks = np.stack([zero, 1 + head, 2 + head + n - b], axis=1)
        return marks, marks + 1, np.stack([head, n - b, b - head], axis=1), np.stack([zero, b, head], axis=1)


def _uniform(documents: HashArray, seed: int, *purpose: int | str) -> npt.NDArray[np.float64]:
    """A number in [0, 1) per document, fixed by seed, purpose and document."""
    key = json.dumps([seed, "fill in the middle", *purpose]).encode()
    salt = np.frombuffer(hashlib.blake2b(key, digest_size=8).digest(), "<u8")
    return (mix(documents ^ salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
