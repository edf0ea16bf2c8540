"""Who owns what; the exchanges themselves are tested by the optimiser's runs in several processes."""

from __future__ import annotations

import torch

from lmssl.optim.exchange import owners, row_range


def test_work_is_divided_evenly() -> None:
    costs = [7, 1, 1, 1, 5, 5, 3, 3, 3, 3]
    for num_ranks in (1, 2, 3, 4):
        load = [0] * num_ranks
        for cost, owner in zip(costs, owners(costs, num_ranks), strict=True):
            load[owner] += cost
        assert max(load) <= sum(costs) / num_ranks + max(costs) / 2


def test_every_rank_finds_the_same_owners_of_equal_costs() -> None:
    assert owners([2, 2, 2, 2], 2) == [0, 1, 0, 1]


def test_rows_are_those_of_torch_chunk() -> None:
    for rows in (1, 2, 5, 8, 9):
        for num_ranks in (1, 2, 3, 4, 7):
            chunks = list(torch.arange(rows).chunk(num_ranks))
            for rank in range(num_ranks):
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert list(range(*row_range(rows, rank, num_ranks))) == expected
