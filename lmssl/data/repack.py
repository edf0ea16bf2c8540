"""What a run has not read of a packed window, packed anew into sequences of another length. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmssl.data.pack import Packing

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Runs:
    """Stretches of documents, each without a gap; shape [runs] each, by document and start."""

    documents: IntArray
    starts: IntArray
    """The document's token at which a run starts."""
    lengths: IntArray
    """Tokens of the document; special tokens around segments are none of them."""

    @classmethod
    def whole(cls, lengths: IntArray) -> Runs:
        """All of every document."""
        return cls(np.arange(len(lengths)), np.zeros_like(lengths), lengths)

    @classmethod
    def unread(cls, packing: Packing, sequences: IntArray, overhead_tokens: int) -> Runs:
        """What some sequences of a packing hold; segments that follow on each other in a document are one run again."""
        segments = np.flatnonzero(np.isin(packing.sequences, sequences))
        documents, starts = packing.documents[segments], packing.starts[segments]
        order = np.lexsort((starts, documents))
        documents, starts = documents[order], starts[order]
        ends = starts + packing.lengths[segments][order] - overhead_tokens
        goes_on = (documents[1:] == documents[:-1]) & (starts[1:] == ends[:-1])
        first, last = np.flatnonzero(np.append(True, ~goes_on)), np.flatnonzero(np.append(~goes_on, True))
        if not len(segments):
            first = last = segments
        return cls(documents[first], starts[first], ends[last] - starts[first])

    def pack(
        self, pack: Callable[[IntArray, int, int], Packing], num_documents: int, length: int, overhead_tokens: int
    ) -> Packing:
        """The runs, packed as documents are, and told as what they are of which document."""
        found = pack(self.lengths, length, overhead_tokens)
        documents, starts = self.documents[found.documents], self.starts[found.documents] + found.starts
        return Packing(length, num_documents, found.offsets, documents, starts, found.lengths)
