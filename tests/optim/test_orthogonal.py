"""Orthogonal factors against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from lmssl.optim.orthogonal import cost, orthogonal_factors, orthogonalized


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (48, 48), (1, 16)])
def test_singular_values_end_near_one_and_vectors_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = random(3, *shape)
    found = orthogonal_factors(matrices.to(dtype))
    assert found.dtype == dtype
    for matrix, factor in zip(matrices, found.float(), strict=True):
        values = torch.linalg.svdvals(factor)
        original = torch.linalg.svdvals(matrix) / torch.linalg.matrix_norm(matrix)
        assert values.max() < 1.15
        assert values[original > 0.005].min() > 0.8
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        in_its_basis = left.mT @ factor @ right.mT  # diagonal if singular vectors are kept
        off = in_its_basis - torch.diag(in_its_basis.diagonal())
        assert off.abs().max() < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_a_matrix_does_not_matter(scale: float) -> None:
    matrix = random(1, 8, 12)
    torch.testing.assert_close(orthogonal_factors(matrix * scale), orthogonal_factors(matrix), rtol=1e-4, atol=1e-5)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(orthogonal_factors(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_matrices_of_many_shapes_come_back_in_order() -> None:
    matrices = [random(*shape, seed=n) for n, shape in enumerate([(4, 6), (6, 4), (5, 5), (4, 6), (2, 9)])]
    for matrix, factor in zip(matrices, orthogonalized(matrices), strict=True):
        torch.testing.assert_close(factor, orthogonal_factors(matrix[None])[0])


def test_few_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [random(4, 6, seed=n) for n in range(5)]
    together = orthogonalized(matrices)
    monkeypatch.setattr("lmssl.optim.orthogonal._MOST_ELEMENTS", 30)
    for one, other in zip(orthogonalized(matrices), together, strict=True):
        torch.testing.assert_close(one, other)


def test_cost_does_not_ask_which_side_is_longer() -> None:
    assert cost(4, 6) == cost(6, 4) == 2 * 16 * 6 + 64
