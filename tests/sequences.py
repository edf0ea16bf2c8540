"""Packed sequences of random ids for tests of objectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lmssl.data.batch import SequenceBatch


def packed(
    *rows: Sequence[int], length: int = 24, first: int = 1, vocab_size: int = 97, position: int = 0, seed: int = 0
) -> SequenceBatch:
    """Rows of segments of the given lengths, padded with 0; ids are random ones of [first, vocab_size)."""
    shape = (len(rows), length)
    ids, segments, offsets = np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.zeros(shape, np.int64)
    random = np.random.default_rng(seed)
    for row, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths):
            ids[row, at : at + n] = random.integers(first, vocab_size, n)
            segments[row, at : at + n] = number + 1
            offsets[row, at : at + n] = np.arange(n)
            at += n
    positions = np.arange(position, position + len(rows))
    return SequenceBatch(ids, segments, offsets, positions, np.array([float(3 * sum(row)) for row in rows]))


def segments_of(batch: SequenceBatch) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """(row, number, where its tokens stand) of every segment."""
    for row in range(len(batch.ids_BT)):
        for number in range(1, int(batch.segments_BT[row].max()) + 1):
            yield row, number, np.flatnonzero(batch.segments_BT[row] == number)
