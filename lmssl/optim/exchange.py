"""Moves matrices between processes for an optimiser that needs them whole: who owns which, and the exchanges.

Bytes are sent, whatever the type, because gloo knows few types. All processes call each function together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, distributed


def owners(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Who has each of some jobs, or tensors, so that all have about as much: a pure function.

    The dearest goes first, each to the rank that has least, so no rank has more than 4/3 of what is possible at best.

    Source: Graham 1969, longest processing time first; equal costs keep their order.

    >>> owners([5, 1, 4, 3], 2)
    [0, 0, 1, 1]
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, found[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[index], found[index]))
    return found


def row_range(rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First row of a rank's shard of a matrix and the one after its last, as `torch.chunk` and FSDP2 divide them.

    >>> [row_range(5, rank, 4) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-rows // num_ranks)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def gather_to_owners(
    shards: Sequence[Tensor], shapes: Sequence[torch.Size], owner: Sequence[int], group: distributed.ProcessGroup
) -> list[Tensor]:
    """The whole matrices that this rank owns, in order, from every rank's rows of all of them.

    Args:
        shards: this rank's rows of each matrix, of one type.
        shapes: of the whole matrices.
        owner: rank within the group for each.
    """
    rank, size = group.rank(), group.size()
    send = [_joined([s for s, o in zip(shards, owner, strict=True) if o == r], shards[0]) for r in range(size)]
    mine = [shape for shape, o in zip(shapes, owner, strict=True) if o == rank]
    counts = [sum(_count(shape, source, size) for shape in mine) for source in range(size)]
    received = _all_to_all(send, counts, group)
    found = [shards[0].new_empty(shape) for shape in mine]
    for source, flat in enumerate(received):
        sizes = [_count(shape, source, size) for shape in mine]
        for matrix, part in zip(found, flat.split(sizes), strict=True):
            first, last = row_range(matrix.shape[0], source, size)
            matrix[first:last] = part.view(last - first, matrix.shape[1])
    return found


def scatter_from_owners(
    wholes: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    owner: Sequence[int],
    group: distributed.ProcessGroup,
    *,
    like: Tensor,
) -> list[Tensor]:
    """This rank's rows of every matrix, from their owners: the inverse of `gather_to_owners`.

    Args:
        wholes: the matrices that this rank owns.
        like: a tensor of the type and device of all of them, for ranks that own none.
    """
    rank, size = group.rank(), group.size()
    send = [
        _joined([matrix[slice(*row_range(matrix.shape[0], target, size))] for matrix in wholes], like)
        for target in range(size)
    ]
    by_owner = [[i for i, o in enumerate(owner) if o == source] for source in range(size)]
    counts = [sum(_count(shapes[i], rank, size) for i in indices) for indices in by_owner]
    found = [like.new_empty(0)] * len(shapes)
    for indices, flat in zip(by_owner, _all_to_all(send, counts, group), strict=True):
        for index, part in zip(indices, flat.split([_count(shapes[i], rank, size) for i in indices]), strict=True):
            found[index] = part.view(-1, shapes[index][1])
    return found


def share_from_owners(
    owned: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    owner: Sequence[int],
    group: distributed.ProcessGroup,
    *,
    like: Tensor,
) -> list[Tensor]:
    """All tensors on every rank, from those that this rank owns, in order.

    Args:
        like: a tensor of the type and device of all of them, for ranks that own none.
    """
    size = group.size()
    by_owner = [[i for i, o in enumerate(owner) if o == source] for source in range(size)]
    counts = [sum(shapes[i].numel() for i in indices) for indices in by_owner]
    longest = max(counts)
    padded = like.new_zeros(longest)
    flat = _joined(owned, like)
    padded[: flat.numel()] = flat
    everything = like.new_empty(size * longest)
    distributed.all_gather_into_tensor(everything.view(torch.uint8), padded.view(torch.uint8), group=group)
    found = [like.new_empty(0)] * len(shapes)
    for source, indices in enumerate(by_owner):
        flat = everything[source * longest :][: counts[source]]
        for index, part in zip(indices, flat.split([shapes[i].numel() for i in indices]), strict=True):
            found[index] = part.view(shapes[index])
    return found


def _count(shape: torch.Size, rank: int, num_ranks: int) -> int:
    first, last = row_range(shape[0], rank, num_ranks)
    return (last - first) * shape[1]


def _joined(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else like.new_empty(0)


def _all_to_all(send: Sequence[Tensor], counts: Sequence[int], group: distributed.ProcessGroup) -> list[Tensor]:
    """One flat tensor from every rank, given one for every rank."""
    width = send[0].element_size()
    received = send[0].new_empty(sum(counts))
    distributed.all_to_all_single(
        received.view(torch.uint8),
        torch.cat(list(send)).view(torch.uint8),
        output_split_sizes=[count * width for count in counts],
        input_split_sizes=[part.numel() * width for part in send],
        group=group,
    )
    ends = list(accumulate(counts))
    return [received[end - count : end] for count, end in zip(counts, ends, strict=True)]
