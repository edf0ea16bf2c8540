"""Documents -> sequences of segments. Pure: lengths in, a `Packing` out.

Every token of every document lands in exactly one segment, and the result depends on the lengths alone. Around each
segment there may be `overhead_tokens` more, such as cls and sep: then every cut of a document costs as many again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_LEAST = 8
"""Where segments have an overhead, best-fit packing neither fills gaps for fewer tokens nor leaves smaller remainders:
they would see next to no context, and cost an overhead as well."""


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
    """Shape [segments]: the document's token at which the segment starts, overheads not counted."""
    lengths: IntArray
    """Shape [segments]: tokens of the segment, its overhead included."""

    @property
    def num_sequences(self) -> int:
        """Sequences, the last of which may be short."""
        return len(self.offsets) - 1

    @property
    def sequences(self) -> IntArray:
        """Shape [segments]: the sequence of each segment."""
        return np.repeat(np.arange(self.num_sequences), np.diff(self.offsets))

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
        order = np.lexsort((self.starts > 0, self.sequences))  # stable: otherwise the order of the documents
        columns = (self.documents[order], self.starts[order], self.lengths[order])
        return Packing(self.sequence_length, self.num_documents, self.offsets, *columns)

    def runs(self) -> tuple[IntArray, IntArray, IntArray]:
        """Lengths and numbers of the segments of all sequences, where each sequence's runs begin, and its padding.

        Shapes [2, runs], [sequences + 1] and [sequences]. In a sequence segments count from 1; padding is a run of 0.
        """
        counts, sequences = np.diff(self.offsets), self.sequences
        numbers = np.arange(len(self.lengths)) - np.repeat(self.offsets[:-1], counts) + 1
        used = np.bincount(sequences, self.lengths, self.num_sequences).astype(np.int64)
        short = np.flatnonzero(used < self.sequence_length)
        runs = np.stack([self.lengths, numbers])
        padding = np.stack([self.sequence_length - used[short], np.zeros_like(short)])
        offsets = self.offsets + np.concatenate([[0], np.cumsum(used < self.sequence_length)])
        return np.insert(runs, self.offsets[short + 1], padding, axis=1), offsets, self.sequence_length - used


def pack_best_fit(num_tokens: Sequence[int] | IntArray, sequence_length: int, overhead_tokens: int = 0) -> Packing:
    """Best-fit decreasing: each document goes where it leaves the least space, long ones first.

    Documents that fit into a sequence with their overhead are never cut. Of longer ones the remainder is packed like a
    document, and whole bodies, as long as a sequence, fill the gaps that are left, the biggest first; so with enough
    long documents less than one sequence of padding remains. Segments with an overhead leave a little more: gaps for
    fewer than `_LEAST` tokens, and up to one overhead for each document that fills gaps.
    Source: best-fit packing of Ding et al. 2024, "Fewer Truncations Improve Language Modeling"; spaces are kept in
    the bits of an integer instead of a tree.

    num_tokens: shape [documents], special tokens included but for overheads, which are shorter than half a sequence.
    """
    lengths, capacity = np.asarray(num_tokens, dtype=np.int64), sequence_length - overhead_tokens
    bodies, rest = np.divmod(lengths, capacity)
    short = lengths <= capacity
    bodies[short], rest[short] = 0, lengths[short]
    pieces, piece_start, piece_size = _remainders(bodies, rest, capacity, overhead_tokens)
    sequence_of, spaces = _best_fit(piece_size + overhead_tokens, sequence_length)
    body_of = np.repeat(np.arange(len(lengths)), bodies)
    body_start = _ranks(bodies) * capacity
    filled, whole = _fill(spaces, body_of, body_start, capacity, overhead_tokens)
    rows = np.concatenate([sequence_of, filled[0], len(spaces) + np.arange(len(whole))])
    documents = np.concatenate([pieces, filled[1], body_of[whole]])
    starts = np.concatenate([piece_start, filled[2], body_start[whole]])
    sizes = np.concatenate([piece_size, filled[3], np.full(len(whole), capacity)]) + overhead_tokens
    return _packing(rows, documents, starts, sizes, sequence_length, len(lengths))


def pack_concat(num_tokens: Sequence[int] | IntArray, sequence_length: int, overhead_tokens: int = 0) -> Packing:
    """All documents end to end, cut where a sequence is full.

    Padding stands at the very end alone; with an overhead also, two of it at most, in a sequence that begins or ends
    between documents.

    num_tokens: shape [documents], special tokens included but for overheads, which are shorter than half a sequence.
    """
    lengths, capacity = np.asarray(num_tokens, dtype=np.int64), sequence_length - overhead_tokens
    some = np.flatnonzero(lengths)
    begins = _on_axis(lengths[some], overhead_tokens)
    total = int(begins[-1] + lengths[some[-1]]) if len(some) else 0
    cuts, which, inside, sizes = _cut(begins, lengths[some], np.arange(0, total, capacity))
    documents = some[which]
    return _packing(cuts // capacity, documents, inside, sizes + overhead_tokens, sequence_length, len(lengths))


def pack_none(num_tokens: Sequence[int] | IntArray, sequence_length: int, overhead_tokens: int = 0) -> Packing:
    """One piece of one document per sequence, the rest padding.

    num_tokens: shape [documents], special tokens included but for overheads, which are shorter than half a sequence.
    """
    lengths, capacity = np.asarray(num_tokens, dtype=np.int64), sequence_length - overhead_tokens
    pieces = -(-lengths // capacity)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    starts = _ranks(pieces) * capacity
    sizes = np.minimum(capacity, lengths[documents] - starts) + overhead_tokens
    return _packing(np.arange(len(documents)), documents, starts, sizes, sequence_length, len(lengths))


PACKINGS = {"best_fit": pack_best_fit, "concat": pack_concat, "none": pack_none}
"""The values of `data.packing`."""


def _remainders(bodies: IntArray, rest: IntArray, capacity: int, overhead: int) -> tuple[IntArray, IntArray, IntArray]:
    """What is packed like documents, longest first: document, start and own tokens of each piece.

    A remainder of fewer than `_LEAST` tokens and the body before it become two pieces of one size, which leave no gaps
    as small as itself; `bodies` and `rest` are changed accordingly.
    """
    thin = np.flatnonzero((rest > 0) & (rest < _LEAST) & (bodies > 0) & (overhead > 0) & (capacity >= 2 * _LEAST))
    bodies[thin] -= 1
    second = (capacity + rest[thin]) // 2
    rest[thin] += capacity - second
    some = np.flatnonzero(rest)
    documents = np.concatenate([some, thin])
    starts = np.concatenate([bodies[some] * capacity, bodies[thin] * capacity + rest[thin]])
    sizes = np.concatenate([rest[some], second])
    order = np.argsort(-sizes, kind="stable")
    return documents[order], starts[order], sizes[order]


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
    spaces: IntArray, body_of: IntArray, body_start: IntArray, capacity: int, overhead: int
) -> tuple[tuple[IntArray, IntArray, IntArray, IntArray], IntArray]:
    """Cut whole bodies into the gaps, biggest gap first: (rows, documents, starts, own tokens), and the bodies kept."""
    rooms = np.where(spaces >= overhead + _LEAST, spaces - overhead, 0) if overhead else spaces
    gaps = np.argsort(-spaces, kind="stable")
    gap_ends = np.cumsum(rooms[gaps])
    # Bodies that follow on each other in a document are one run, unless a cut between them costs nothing.
    opens = (body_start == 0) | (overhead == 0)
    body_ends = np.arange(1, len(body_of) + 1) * capacity + overhead * (np.cumsum(opens) - 1)
    donated = int(np.searchsorted(body_ends, gap_ends[-1] if len(gaps) else 0, side="right"))
    first = np.flatnonzero(opens[:donated])
    lengths = np.diff(np.append(first, donated)) * capacity
    cuts, run, inside, sizes = _cut(_on_axis(lengths, overhead), lengths, gap_ends - rooms[gaps])
    gap = np.searchsorted(gap_ends, cuts, side="right")
    pieces = (gaps[gap], body_of[first][run], body_start[first][run] + inside, sizes)
    return pieces, np.arange(donated, len(body_of))


def _on_axis(lengths: IntArray, overhead: int) -> IntArray:
    """Where runs of tokens begin that lie end to end, with room for one overhead between them.

    A gap (or sequence) that is on this axis shorter by one overhead than it is holds whatever lies on its stretch: the
    first piece's overhead is what it is shorter by, and before each other piece lies a whole room.
    """
    return np.cumsum(lengths) - lengths + overhead * np.arange(len(lengths))


def _cut(begins: IntArray, lengths: IntArray, bounds: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Pieces of runs on an axis, cut at bounds: where they begin, their run, where in it they begin, their length."""
    ends = begins + lengths
    last = ends[ends != np.append(begins[1:], -1)]  # mostly, where one run ends the next begins
    cuts = np.unique(np.concatenate([begins, last, bounds]))
    run = np.searchsorted(begins, cuts, side="right") - 1
    sizes = np.diff(cuts, append=cuts[-1:])
    some = (run >= 0) & (cuts < ends[run]) if len(ends) else np.zeros(len(cuts), dtype=bool)
    cuts, run = cuts[some], run[some]
    return cuts, run, cuts - begins[run], sizes[some]


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
