"""What all ranks agree on while they train: whether to stop, and how long the run has taken.

Ranks that decide alone hang: one leaves the loop, the others wait for it in the next exchange of gradients. So wishes
are summed over ranks, on the host, at every micro-batch; the sum is asked for in one call and taken in the next, so
that nobody waits for the network and no device is ever waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(days=7)
"""Of one sum. The watch over hanging ranks has its own, shorter patience, and names the rank."""


class Agreement:
    """The same answers on every rank, at the same call."""

    def __init__(
        self,
        wants_stop: Callable[[], bool],
        elapsed_seconds: Callable[[], float],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        seconds: float = 0.0,
    ) -> None:
        """Every rank must make one, and then call `poll` equally often.

        Args:
            wants_stop: whether this rank was asked to stop.
            elapsed_seconds: of the run, over all its sessions; that of rank 0 counts.
            seconds: of it before this session, the same on every rank.
        """
        self._wants_stop = wants_stop
        self._elapsed_seconds = elapsed_seconds
        self._rank = rank
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if num_ranks > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None
        self.stopping = False
        """Whether some rank was asked to stop, as of the last `poll`."""
        self.seconds = seconds
        """Of the run by the clock of rank 0, as of the last `poll`."""

    def poll(self) -> bool:
        """Whether all ranks stop here: a rank was asked to before the call ahead of this one, or alone, before this."""
        if self._group is None:
            self.stopping, self.seconds = self._wants_stop(), self._elapsed_seconds()
            return self.stopping
        self._take()
        wishes = [float(self._wants_stop()), self._elapsed_seconds() if self._rank == 0 else 0.0]
        tensor = torch.tensor(wishes, dtype=torch.float64)
        self._asked = dist.all_reduce(tensor, group=self._group, async_op=True), tensor
        return self.stopping

    def close(self) -> None:
        """Wait for the last sum; every rank must call where none has failed."""
        if self._group is not None:
            self._take()

    def _take(self) -> None:
        if self._asked is not None:
            work, tensor = self._asked
            self._asked = None
            work.wait()
            num_wishes, self.seconds = tensor.tolist()
            self.stopping = num_wishes > 0
