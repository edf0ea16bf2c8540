"""An exponential moving average of the weights, kept beside them on their device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def decay_at(decay: float, step: int) -> float:
    """What the average keeps of itself in the step after `step` completed ones.

    Source: the average of Polyak & Juditsky 1992 in its exponential form, with the warm start min(decay, (1 + t) /
    (10 + t)) of TensorFlow's `ExponentialMovingAverage`; so it needs no bias correction and forgets the initial weights
    soon, at every run length. Differs in that t counts steps, those without an update included: then it needs no state.

    >>> [round(decay_at(0.999, step), 3) for step in (0, 90, 8_990, 100_000)]
    [0.1, 0.91, 0.999, 0.999]
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The moving average of every weight of a model: float32, where and as the weight is, by its name.

    It begins as a copy of the weights: of all of each, or of the part of it that this process holds. Replicated weights
    have replicated averages: equal updates on every rank.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self._weights = dict(weights)
        self.averages = {name: weight.detach().to(torch.float32, copy=True) for name, weight in self._weights.items()}

    def update(self, finite: Tensor, *, step: int) -> None:
        """Move towards the weights after an update; not at all where the update was not made.

        Args:
            finite: 1.0 if the update was made, else 0.0; on the weights' device, and never read by the host.
            step: completed steps before this one.
        """
        with torch.no_grad():
            # a + 0 * (b - a) is a: weights are finite, since an update that is not finite is never made.
            share = (1.0 - decay_at(self._decay, step)) * finite.float()
            averages = list(self.averages.values())
            torch._foreach_lerp_(averages, list(self._weights.values()), [share] * len(averages))
