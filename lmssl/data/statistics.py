"""What the first epoch of a corpus holds, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

import numpy as np

from lmssl.data.filters import is_held_out
from lmssl.data.stream import SequenceStream
from lmssl.data.window import Window


@dataclass(frozen=True)
class Statistics:
    """Counts over the first epoch of one corpus, or of several."""

    num_documents: int = 0
    """Trained on."""
    num_tokens: int = 0
    """Special tokens included, padding not."""
    num_bytes: int = 0
    """Bytes of the documents' text, where they are known."""
    num_tokens_with_bytes: int = 0
    """Those of `num_tokens` that `num_bytes` belongs to; a corpus of ready-made tokens has none."""
    num_sequences: int = 0
    num_padding_tokens: int = 0
    num_cut_documents: int = 0
    """Documents that stand in more than one segment."""
    num_bad_records: int = 0
    num_empty_documents: int = 0
    """White space alone, left out."""
    num_held_out_documents: int = 0
    num_dropped_short: int = 0
    """Documents that filters left out, by reason."""
    num_dropped_long: int = 0
    num_dropped_duplicates: int = 0
    num_dropped_overlaps: int = 0
    histogram: tuple[int, ...] = ()
    """Documents by length: i counts those of 2**(i - 1) up to 2**i - 1 tokens, and 0 those without any."""

    def __add__(self, other: Statistics) -> Statistics:
        counts = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "histogram"
        }
        bins = zip_longest(self.histogram, other.histogram, fillvalue=0)
        return Statistics(**counts, histogram=tuple(a + b for a, b in bins))

    @property
    def num_dropped_documents(self) -> int:
        """Documents that filters left out."""
        return self.num_dropped_short + self.num_dropped_long + self.num_dropped_duplicates + self.num_dropped_overlaps

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text / the tokens they belong to, special tokens included; None: no bytes are known."""
        return self.num_bytes / self.num_tokens_with_bytes if self.num_tokens_with_bytes else None

    @property
    def padding_ratio(self) -> float:
        """Padding / all tokens of the sequences."""
        return self.num_padding_tokens / max(1, self.num_padding_tokens + self.num_tokens)

    @property
    def cut_documents_ratio(self) -> float:
        """Documents that are cut / documents."""
        return self.num_cut_documents / max(1, self.num_documents)

    def bins(self) -> list[tuple[int, int, int]]:
        """(fewest tokens, most tokens, documents) per bin, from the first to the last that is not empty."""
        filled = [i for i, count in enumerate(self.histogram) if count]
        inside = range(filled[0], filled[-1] + 1) if filled else ()
        return [(1 << i >> 1, (1 << i) - 1, self.histogram[i]) for i in inside]

    def to_json(self) -> dict[str, Any]:
        """Counts, ratios and histogram as plain values."""
        return {
            "num_sequences_per_epoch": self.num_sequences,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_tokens_with_bytes": self.num_tokens_with_bytes,
            "bytes_per_token": self.bytes_per_token,
            "num_padding_tokens": self.num_padding_tokens,
            "padding_ratio": self.padding_ratio,
            "num_cut_documents": self.num_cut_documents,
            "cut_documents_ratio": self.cut_documents_ratio,
            "num_bad_records": self.num_bad_records,
            "num_empty_documents": self.num_empty_documents,
            "num_held_out_documents": self.num_held_out_documents,
            "num_dropped_short": self.num_dropped_short,
            "num_dropped_long": self.num_dropped_long,
            "num_dropped_duplicates": self.num_dropped_duplicates,
            "num_dropped_overlaps": self.num_dropped_overlaps,
            "length_histogram": [{"from": a, "to": b, "documents": count} for a, b, count in self.bins()],
        }


def measure(stream: SequenceStream, corpus: str, progress: Callable[[Statistics], None]) -> Statistics:
    """Build the first epoch of a corpus and count it; `progress` hears the counts so far after every window.

    Raises:
        DataError: a source cannot be read.
    """
    total = Statistics()
    for _, window in stream.first_epoch(corpus):
        if not window.plan.repacked:  # else its documents are counted already, as they were packed first
            total += _of_window(window)
            progress(total)
    return total


def _of_window(window: Window) -> Statistics:
    packing, layout = window.packing, window.layout
    lengths = np.bincount(packing.documents, weights=packing.lengths, minlength=packing.num_documents).astype(np.int64)
    num_bad, num_empty, num_held_out = 0, 0, 0
    for chunk in window.chunks:
        num_bad += chunk.meta.num_bad
        num_empty += chunk.meta.num_empty
        num_held_out += int(is_held_out(chunk.documents()["text_hash"], layout.seed, layout.held_out_ratio).sum())
    return Statistics(
        num_documents=window.num_documents,
        num_tokens=window.num_tokens,
        num_bytes=window.num_bytes,
        num_tokens_with_bytes=window.num_tokens if window.num_bytes else 0,  # a corpus knows all of them, or none
        num_sequences=window.num_sequences,
        num_padding_tokens=packing.num_padding,
        num_cut_documents=packing.num_cut_documents,
        num_bad_records=num_bad,
        num_empty_documents=num_empty,
        num_held_out_documents=num_held_out,
        **asdict(window.dropped),
        # The exponent of 2**(i - 1) <= length < 2**i is i.
        histogram=tuple(np.bincount(np.frexp(lengths.astype(np.float64))[1]).tolist()),
    )
