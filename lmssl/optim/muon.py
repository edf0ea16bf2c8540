"""Muon for hidden matrices and AdamW for everything else, as one optimiser, in one process or divided over many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard

from lmssl.optim.exchange import gather_to_owners, owners, scatter_from_owners, share_from_owners
from lmssl.optim.orthogonal import cost, orthogonalized
from lmssl.optim.parts import Parts

UPDATE_RMS = 0.2
"""Root mean square of an update's numbers at rate 1: about what AdamW's are in training."""
_MOST_ELEMENTS = 2**28
"""Numbers of the matrices that are exchanged at once, over all processes: it bounds memory."""


@dataclass(frozen=True)
class _Matrix:
    """One weight with all that its update needs to know."""

    weight: Tensor
    group: dict[str, Any]
    parts: Parts
    keeper: int
    """Which of the processes with copies of this weight, or of this shard of it, keeps its momentum and updates it."""
    owner: int
    """Which of the processes with shards of it has it whole and orthogonalises it."""

    @property
    def local(self) -> Tensor:
        """The weight, or this process's rows of it."""
        return _local(self.weight)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and fused AdamW behind one set of groups and states.

    A matrix has the state `momentum`, float32, an exponential moving average of its gradients. Its update is the
    orthogonal factor of the average looked ahead (Nesterov), of each projection in it by itself; everything else has
    AdamW's states. If `found_inf` is set and not 0, nothing changes, and the host does not learn of it.

    Copies of a weight: one process keeps its momentum, works out its update, and tells the others; work is divided
    evenly. Shards of a weight (FSDP2: DTensor, rows): momentum stays sharded; one process gathers the averages,
    orthogonalises and gives the rows back. Copies of shards (HSDP): both.

    Source: Jordan et al. 2024, with decoupled decay and `0.2 sqrt(max(rows, columns))` of Liu et al. 2025 (Moonlight),
    who also divide work over processes with copies. Differs in Polar Express, and in the exchange for shards.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        parts: Mapping[str, Parts],
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        ranks: distributed.ProcessGroup | None,
        bf16: bool,
    ) -> None:
        """Args: `groups` of `groups.parameter_groups`; `parts` by name; `ranks` and `bf16` as in `build_optimizer`."""
        for group in groups:
            if group["optimizer"] == "muon":
                group["momentum"] = momentum
        super().__init__(groups, {})
        others = [group for group in self.param_groups if group["optimizer"] == "adamw"]
        # The same dictionaries, so that rates and states are set and read in one place.
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True) if others else None
        if self._adamw is not None:
            self._adamw.state = self.state
        self._type = torch.bfloat16 if bf16 else torch.float32
        matrices = [
            (weight, group, parts[name])
            for group in self.param_groups
            if group["optimizer"] == "muon"
            for name, weight in zip(group["names"], group["params"], strict=True)
        ]
        self._copies, self._shards = _processes([weight for weight, _, _ in matrices], ranks)
        self._rounds = list(_rounds(matrices, _size(self._copies), _size(self._shards)))
        self._keeper = {id(matrix.weight): matrix.keeper for matrices in self._rounds for matrix in matrices}

    def keeper(self, weight: Tensor) -> int | None:
        """The rank, among the processes with copies of a weight, that alone keeps its state; None: all do.

        With `ranks` given, that is the rank within `ranks`; under HSDP, within the mesh's dimension of copies.
        """
        return None if self._copies is None else self._keeper.get(id(weight))

    def keeps(self, weight: Tensor) -> bool:
        """Whether this process keeps the state of a weight, or its shard of that."""
        keeper = self.keeper(weight)
        return keeper is None or self._copies is None or keeper == self._copies.rank()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight once from its gradient; the closure of torch's interface is not supported."""
        assert closure is None
        if self._adamw is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]  # read by the fused kernel
            self._adamw.step()
        for matrices in self._rounds:
            # Gradients are exchanged over processes, so what has none here has none anywhere.
            given = [matrix for matrix in matrices if matrix.weight.grad is not None]
            if given:
                self._update(given)

    def _update(self, matrices: list[_Matrix]) -> None:
        """One round: momentum where it is kept, whole matrices where they are owned, updates everywhere."""
        mine = [matrix for matrix in matrices if self.keeps(matrix.weight)]
        for matrix in matrices:
            if not self.keeps(matrix.weight):
                self.state.pop(matrix.weight, None)  # a checkpoint's, put back on every rank
        like = torch.empty(0, dtype=self._type, device=matrices[0].local.device)
        updates = [self._ahead(matrix).to(self._type) for matrix in mine]
        shapes = [matrix.weight.shape for matrix in mine]
        if self._shards is not None and mine:
            owner = [matrix.owner for matrix in mine]
            wholes = gather_to_owners(updates, shapes, owner, self._shards)
            owned = [matrix for matrix in mine if matrix.owner == self._shards.rank()]
            updates = scatter_from_owners(_orthogonal(wholes, owned), shapes, owner, self._shards, like=like)
        else:
            updates = _orthogonal(updates, mine)
        if self._copies is not None:
            local = [matrix.local.shape for matrix in matrices]
            updates = share_from_owners(updates, local, [m.keeper for m in matrices], self._copies, like=like)
        for matrix, update in zip(matrices, updates, strict=True):
            self._apply(matrix, update)

    def _ahead(self, matrix: _Matrix) -> Tensor:
        """Move the momentum on; returns the gradient mixed with it, float32, of this process's rows.

        The gradient is cleared where the update is not to be made: 0 times NaN would be NaN.
        """
        gradient = _local(matrix.weight.grad)
        state, momentum = self.state[matrix.weight], matrix.group["momentum"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix.weight)
        average = _local(state["momentum"])
        if self.found_inf is None:
            average.lerp_(gradient, 1 - momentum)
        else:
            gradient.masked_fill_(self.found_inf.to(gradient.device) != 0, 0.0)
            average.lerp_(gradient, self._finite(gradient) * (1 - momentum))
        return gradient.lerp(average, momentum)

    def _apply(self, matrix: _Matrix, update: Tensor) -> None:
        """Decay, then the update; both multiplied by 0 where it is not to be made."""
        weight, lr, decay = matrix.local, matrix.group["lr"], matrix.group["weight_decay"]
        if self.found_inf is None:
            weight.mul_(1 - lr * decay)
            weight.sub_(update, alpha=lr)
        else:
            finite = self._finite(weight)
            weight.mul_(1 - finite * (lr * decay))
            weight.sub_(update.float() * (finite * lr))

    def _finite(self, like: Tensor) -> Tensor:
        assert self.found_inf is not None
        return 1.0 - self.found_inf.to(like.device)


def _orthogonal(wholes: Sequence[Tensor], matrices: Sequence[_Matrix]) -> list[Tensor]:
    """The update of whole weights at rate 1: each part's orthogonal factor, scaled to `UPDATE_RMS`."""
    flat = [part for whole, matrix in zip(wholes, matrices, strict=True) for part in matrix.parts.split(whole)]
    scaled = [factor * (UPDATE_RMS * math.sqrt(max(factor.shape))) for factor in orthogonalized(flat)]
    found = []
    for matrix in matrices:
        count = max(1, len(matrix.parts.sizes))
        found.append(matrix.parts.join(scaled[:count]))
        scaled = scaled[count:]
    return found


def _rounds(
    matrices: Sequence[tuple[Tensor, dict[str, Any], Parts]], num_copies: int, num_shards: int
) -> Iterator[list[_Matrix]]:
    """All matrices in rounds of bounded size; in each, work is divided evenly, those of one shape standing together."""
    ordered = sorted(matrices, key=lambda item: tuple(item[0].shape))
    some: list[tuple[Tensor, dict[str, Any], Parts]] = []
    for index, item in enumerate(ordered):
        some.append(item)
        following = ordered[index + 1][0].numel() if index + 1 < len(ordered) else None
        if following is None or sum(weight.numel() for weight, _, _ in some) + following > _MOST_ELEMENTS:
            work = owners([_cost(weight, parts) for weight, _, parts in some], num_copies * num_shards)
            yield [_Matrix(*job, who // num_shards, who % num_shards) for job, who in zip(some, work, strict=True)]
            some = []


def _cost(weight: Tensor, parts: Parts) -> int:
    if not parts.sizes:
        return cost(*weight.shape)
    other = weight.shape[1 - parts.dim]
    return sum(cost(size * parts.repeats, other) for size in parts.sizes)


def _processes(
    weights: Sequence[Tensor], ranks: distributed.ProcessGroup | None
) -> tuple[distributed.ProcessGroup | None, distributed.ProcessGroup | None]:
    """The processes with copies of this one's weights, and those with other shards of them; None: there are none.

    Raises:
        ValueError: weights are sharded otherwise than by rows.
    """
    sharded = [weight for weight in weights if isinstance(weight, DTensor)]
    if not sharded:
        return (ranks if _size(ranks) > 1 else None), None
    if len(sharded) < len(weights) or len({(weight.device_mesh, weight.placements) for weight in sharded}) > 1:
        raise ValueError("Muon needs all matrices sharded in one way; shard the whole model by FSDP2")
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    copies = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
    rows = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    if len(copies) > 1 or len(rows) > 1 or len(copies) + len(rows) < len(placements):
        raise ValueError(f"Muon knows matrices sharded by rows, not {placements}")
    found = [mesh.get_group(dims[0]) if dims and mesh.size(dims[0]) > 1 else None for dims in (copies, rows)]
    return found[0], found[1]


def _size(group: distributed.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
