"""The orthogonal factor of matrices, by products of matrices only. Shapes: K matrices of M rows and N columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""Factors of x, x^3 and x^5 in each step, chosen so that steps together take [0.001, 1] closest to 1."""
_SLACK = 1.01
"""Room for rounding, lest a singular value above 1 grows: the first steps are not monotone beyond it."""
_MOST_ELEMENTS = 2**26
"""Numbers that are orthogonalised at once: products of many small matrices together keep a device busy."""


def orthogonal_factors(matrices_KMN: Tensor) -> Tensor:
    """`U V^T` of each matrix `U S V^T`, about: singular values above a thousandth of the norm end in [0.85, 1.13].

    A matrix of zeros stays one.

    Args:
        matrices_KMN: bfloat16 or float32, in which everything is computed, norms apart.
    Source: the Newton-Schulz iteration of Muon (Jordan et al. 2024) with the polynomials of Polar Express (Amsel et
    al. 2025), five steps; differs in computing on equal shapes together.
    """
    transposed = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x_KMN = matrices_KMN.mT if transposed else matrices_KMN
    norms_K = torch.linalg.vector_norm(x_KMN, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x_KMN = (x_KMN / (norms_K * _SLACK).clamp(min=torch.finfo(torch.float32).tiny)).to(matrices_KMN.dtype)
    for linear, cubic, quintic in _STEPS:
        gram_KMM = x_KMN @ x_KMN.mT
        odd_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=cubic / _SLACK**3, alpha=quintic / _SLACK**5)
        x_KMN = torch.baddbmm(x_KMN, odd_KMM, x_KMN, beta=linear / _SLACK)
    return x_KMN.mT if transposed else x_KMN


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal_factors` of matrices [M, N] of any shapes; those of one shape, turned or not, are taken together."""
    found: list[Tensor | None] = [None] * len(matrices)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(index)
    for (rows, columns), indices in by_shape.items():
        count = max(1, _MOST_ELEMENTS // (rows * columns))
        for start in range(0, len(indices), count):
            some = indices[start : start + count]
            flat = torch.stack([m if m.shape[0] == rows else m.mT for m in (matrices[i] for i in some)])
            for index, factor in zip(some, orthogonal_factors(flat).unbind(), strict=True):
                found[index] = factor if matrices[index].shape[0] == rows else factor.mT
    return [factor for factor in found if factor is not None]


def cost(rows: int, columns: int) -> int:
    """Multiplications of `orthogonal_factors` for one matrix, but for a factor that all have."""
    short, long = sorted((rows, columns))
    return 2 * short * short * long + short**3
