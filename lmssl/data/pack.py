"""Documents -> sequences of segments. Pure: lengths in, a `Packing` out.

Every token of every document lands in exactly one segment, and the result depends on the lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences as rows of a sparse matrix: segments `offsets[s]` to `offsets[s + 1]` belong to sequence s."""

    sequence_length: int
    num_documents: int
    offsets: IntArray
    """Shape [sequences + 1]."""
    documents: IntArray
    """Shape [segments]: the document of each segment."""
    starts: IntArray
    """Shape [segments]: the document's token at which the segment starts."""
    lengths: IntArray
    """Shape [segments]: tokens of the segment."""

    @property
    def num_sequences(self) -> int:
        """Sequences, the last of which may be short."""
        return len(self.offsets) - 1

    @property
    def num_padding(self) -> int:
        """Tokens of padding over all sequences."""
        return self.num_sequences * self.sequence_length - int(self.lengths.sum())

    @property
    def padding_ratio(self) -> float:
        """Padding / all tokens."""
        return self.num_padding / max(1, self.num_sequences * self.sequence_length)

    @property
    def num_cut_documents(self) -> int:
        """Documents that stand in more than one segment."""
        return int((np.bincount(self.documents, minlength=self.num_documents) > 1).sum())

    @property
    def num_aligned(self) -> int:
        """Sequences that begin with the start of a document."""
        return int((self.starts[self.offsets[:-1]] == 0).sum())

    def with_starts_first(self) -> Packing:
        """The same sequences; inside each, segments that start a document come before those that continue one.

        A sequence without any start, filled by the inside of long documents, stays as it is.
        Source: sequences that begin with a document, as in nanochat's "BOS-aligned" loader.
        """
        rows = np.repeat(np.arange(self.num_sequences), np.diff(self.offsets))
        order = np.lexsort((self.starts > 0, rows))  # stable: otherwise the order of the documents
        columns = (self.documents[order], self.starts[order], self.lengths[order])
        return Packing(self.sequence_length, self.num_documents, self.offsets, *columns)


def pack_best_fit(num_tokens: Sequence[int] | IntArray, sequence_length: int) -> Packing:
    """Best-fit decreasing: each document goes where it leaves the least space, long ones first.

    Documents of at most `sequence_length` tokens are never cut. Of longer ones the remainder is packed like a
    document, and whole bodies of `sequence_length` tokens fill the gaps that are left, the biggest first; so with
    enough long documents less than one sequence of padding remains.
    Source: best-fit packing of Ding et al. 2024, "Fewer Truncations Improve Language Modeling"; spaces are kept in
    the bits of an integer instead of a tree.

    num_tokens: shape [documents], special tokens included.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    bodies, rest = np.divmod(lengths, sequence_length)
    short = lengths <= sequence_length
    bodies[short], rest[short] = 0, lengths[short]
    pieces = np.flatnonzero(rest)
    pieces = pieces[np.argsort(-rest[pieces], kind="stable")]
    sequence_of, spaces = _best_fit(rest[pieces], sequence_length)
    body_of = np.repeat(np.arange(len(lengths)), bodies)
    body_start = _ranks(bodies) * sequence_length
    filled, whole = _fill(spaces, body_of, body_start, sequence_length)
    rows = np.concatenate([sequence_of, filled[0], len(spaces) + np.arange(len(whole))])
    documents = np.concatenate([pieces, filled[1], body_of[whole]])
    starts = np.concatenate([bodies[pieces] * sequence_length, filled[2], body_start[whole]])
    sizes = np.concatenate([rest[pieces], filled[3], np.full(len(whole), sequence_length)])
    return _packing(rows, documents, starts, sizes, sequence_length, len(lengths))


def pack_concat(num_tokens: Sequence[int] | IntArray, sequence_length: int) -> Packing:
    """All documents end to end, cut every `sequence_length` tokens; padding only at the very end.

    num_tokens: shape [documents], special tokens included.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends - lengths, np.arange(0, total, sequence_length))
    cuts = cuts[cuts < total]
    documents = np.searchsorted(ends, cuts, side="right")
    sizes = np.diff(np.append(cuts, total))
    starts = cuts - (ends - lengths)[documents]
    return _packing(cuts // sequence_length, documents, starts, sizes, sequence_length, len(lengths))


def pack_none(num_tokens: Sequence[int] | IntArray, sequence_length: int) -> Packing:
    """One piece of one document per sequence, the rest padding.

    num_tokens: shape [documents], special tokens included.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    pieces = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    starts = _ranks(pieces) * sequence_length
    sizes = np.minimum(sequence_length, lengths[documents] - starts)
    return _packing(np.arange(len(documents)), documents, starts, sizes, sequence_length, len(lengths))


PACKINGS = {"best_fit": pack_best_fit, "concat": pack_concat, "none": pack_none}
"""The values of `data.packing`."""


def _best_fit(lengths: IntArray, sequence_length: int) -> tuple[IntArray, IntArray]:
    """Sequence of each piece (given in decreasing order), and the space left in each sequence."""
    # Bit s of `spaces` says that some sequence has s tokens left; `waiting[s]` lists which.
    spaces, waiting = 0, [[] for _ in range(sequence_length + 1)]  # type: tuple[int, list[list[int]]]
    left: list[int] = []
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    changes = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))
    piece, run = 0, 0
    while piece < len(lengths):
        if piece == changes[run]:
            run += 1
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = waiting[space].pop()
            if not waiting[space]:
                spaces ^= 1 << space
        else:
            space, sequence = sequence_length, len(left)
            left.append(space)
        # Pieces of the same length follow into the same sequence: nowhere do they leave less space.
        count = min(space // length, int(changes[run]) - piece)
        sequence_of[piece : piece + count] = sequence
        left[sequence] = space - count * length
        if left[sequence]:
            waiting[left[sequence]].append(sequence)
            spaces |= 1 << left[sequence]
        piece += count
    return sequence_of, np.array(left, dtype=np.int64)


def _fill(
    spaces: IntArray, body_of: IntArray, body_start: IntArray, sequence_length: int
) -> tuple[tuple[IntArray, IntArray, IntArray, IntArray], IntArray]:
    """Cut whole bodies into the gaps, biggest gap first: (rows, documents, starts, lengths), and the bodies kept."""
    donated = min(len(body_of), int(spaces.sum()) // sequence_length)
    gaps = np.argsort(-spaces, kind="stable")
    gap_ends = np.cumsum(spaces[gaps])
    total = donated * sequence_length
    # On one axis lie the gaps end to end and the donated bodies end to end; every end of either is a cut.
    cuts = np.union1d(np.append(gap_ends - spaces[gaps], 0), np.arange(donated) * sequence_length)
    cuts = cuts[cuts < total]
    gap = np.searchsorted(gap_ends, cuts, side="right")
    body, inside = np.divmod(cuts, sequence_length)
    pieces = (gaps[gap], body_of[body], body_start[body] + inside, np.diff(np.append(cuts, total)))
    return pieces, np.arange(donated, len(body_of))


def _ranks(counts: IntArray) -> IntArray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _packing(
    rows: IntArray, documents: IntArray, starts: IntArray, lengths: IntArray, sequence_length: int, num_documents: int
) -> Packing:
    """Sort segments by sequence and, inside one, in the order of the documents."""
    order = np.lexsort((starts, documents, rows))
    count = int(rows.max()) + 1 if len(rows) else 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
    return Packing(sequence_length, num_documents, offsets, documents[order], starts[order], lengths[order])
