"""How far a share of right answers can be trusted."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""Of the two-sided 95 % interval."""


def wilson(num_right: int, num_asked: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, from its counts.

    Source: Wilson 1927; unlike the usual one it keeps within 0 and 1 and is not empty at either end.

    >>> low, high = wilson(8, 10)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    >>> wilson(0, 0)
    (0.0, 1.0)
    """
    if not num_asked:
        return 0.0, 1.0
    share, square = num_right / num_asked, Z95**2
    middle = share + square / (2 * num_asked)
    half = Z95 * math.sqrt(share * (1 - share) / num_asked + square / (4 * num_asked**2))
    scale = 1 + square / num_asked
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
