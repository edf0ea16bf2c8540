"""Random spans: their lengths, and where in a sequence they could stand.

Source: Joshi et al. 2020 (SpanBERT): lengths are geometric, and those beyond the longest are drawn again (its mean of
3.8 is that of p = 0.2 up to 10). Ours are counted in tokens, theirs in words. They place one span after the other until
the share is reached and reject overlaps; here the sequence is tiled with spans, with one token between any two, and a
random part of the tiles is taken, so that spans never touch and a masked run is never longer than the longest span.

Shapes: B sequences, T tokens of a sequence, S spans that tile it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class SpanLengths:
    """Lengths from a geometric distribution of a given mean, up to the longest."""

    def __init__(self, mean_tokens: float, max_tokens: int) -> None:
        lengths = np.arange(1, max_tokens + 1)
        self.max_tokens = max_tokens
        self.probabilities = (1.0 - 1.0 / mean_tokens) ** (lengths - 1)
        self.probabilities /= self.probabilities.sum()
        """Of lengths 1, 2, ...; shape [max_tokens]."""
        self.mean_tokens = float(self.probabilities @ lengths)
        """After the cut: below the mean that was given."""
        # The tile that holds a given token is more likely a long one: by its length, the token between included.
        tiles = self.probabilities * (lengths + 1)
        self._thresholds = np.cumsum(self.probabilities)[:-1]
        self._first_thresholds = np.cumsum(tiles / tiles.sum())[:-1]

    def draw(self, uniform: FloatArray) -> IntArray:
        """A length for each number from [0, 1)."""
        return 1 + np.searchsorted(self._thresholds, uniform, side="right").astype(np.int64)

    def draw_first(self, uniform: FloatArray) -> IntArray:
        """Lengths of the spans whose tiles hold a given token."""
        return 1 + np.searchsorted(self._first_thresholds, uniform, side="right").astype(np.int64)

    def num_spans(self, length: int) -> int:
        """Spans that are sure to tile a sequence, wherever the first begins."""
        return (length + self.max_tokens + 1) // 2 + 1


def draw_spans(lengths: SpanLengths, uniform: FloatArray, length: int) -> tuple[BoolArray, BoolArray]:
    """Where spans and the tokens between them start, and which tokens stand between; shape [B, T] each.

    `uniform` has shape [B, S + 1]. The tiling has no beginning: the first tile is cut at a random place, so every
    token of the sequence is as likely to be in a span, and at every place of it.
    """
    sizes_BS = lengths.draw(uniform[:, 1:])
    sizes_BS[:, 0] = lengths.draw_first(uniform[:, 1])
    tiles_BS = sizes_BS + 1
    phase_B = (uniform[:, 0] * tiles_BS[:, 0]).astype(np.int64)
    ends_BS = np.cumsum(tiles_BS, axis=1) - phase_B[:, None]  # one past the token between
    gaps_BT = np.zeros((len(uniform), length), bool)
    inside_BS = ends_BS <= length  # the first tile's is at least 1
    rows, slots = np.nonzero(inside_BS)
    gaps_BT[rows, ends_BS[rows, slots] - 1] = True
    starts_BT = gaps_BT.copy()
    starts_BT[:, 1:] |= gaps_BT[:, :-1]
    starts_BT[:, 0] = True
    return starts_BT, gaps_BT
