"""Randomised SVD by block subspace iteration, for matrices far larger than the rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .svd import thin_svd
from .unfolding import check_rank, check_tensor, squared_norm

# Entries of a block of rows in float64 (128 MiB): its product with a thin basis runs at the speed of BLAS.
ROW_BLOCK = 1 << 24
ADAPTIVE_LIMIT = 8
ADAPTIVE_TOLERANCE = 3e-4
# An error that still falls by less than this of itself is close enough to the best to be kept.
SETTLED = 1e-3


class RandomizedSVD(NamedTuple):
    """`A ≈ U diag(S) Vh`: [m, r], [r] descending, [r, n], with what is known of its accuracy.

    relative_error = ‖A − U S Vh‖/‖A‖ of the float64 parts (from norms, so not below about 1e-8);
    change: by which share of itself that error fell in the last power iteration.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    relative_error: float
    change: float


def _row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, ROW_BLOCK // matrix.shape[1])
    for i in range(0, matrix.shape[0], step):
        yield slice(i, i + step), matrix[i : i + step].double()


def _times(matrix: Tensor, basis: Tensor) -> Tensor:
    """A @ basis, [m, q]."""
    out = torch.empty(matrix.shape[0], basis.shape[1], dtype=torch.float64)
    for rows, block in _row_blocks(matrix):
        torch.mm(block, basis, out=out[rows])
    return out


def _transposed_times(matrix: Tensor, basis: Tensor) -> Tensor:
    """Aᵀ @ basis, [n, q]."""
    out = torch.zeros(matrix.shape[1], basis.shape[1], dtype=torch.float64)
    for rows, block in _row_blocks(matrix):
        out.addmm_(block.T, basis[rows])
    return out


def randomized64(
    matrix: Tensor, rank: int, oversampling: int, power_iterations: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """`randomized_svd` of a checked contiguous matrix: float64 U, S, Vh, relative error, its last change."""
    rows, columns = matrix.shape
    width = min(rows, columns, rank + oversampling)
    generator = torch.Generator().manual_seed(seed)
    total = squared_norm(matrix)
    basis = torch.linalg.qr(torch.randn(columns, width, dtype=torch.float64, generator=generator))[0]
    error, change = math.inf, math.inf
    most = ADAPTIVE_LIMIT if power_iterations is None else power_iterations
    for iteration in range(most + 1):
        left = torch.linalg.qr(_times(matrix, basis))[0]
        basis, triangle = torch.linalg.qr(_transposed_times(matrix, left))  # Aᵀ left = basis · triangle
        values = thin_svd(triangle)[1][:rank]
        before, error = error, math.sqrt(max(0.0, 1.0 - squared_norm(values) / total)) if total else 0.0
        change = (
            (before - error) / before
            if before not in (0.0, math.inf)
            else (0.0 if error == 0.0 else math.inf)
        )
        if power_iterations is None and iteration and change < ADAPTIVE_TOLERANCE:
            break
    # leftᵀ A = triangleᵀ basisᵀ
    u, s, vh = thin_svd(triangle.T.contiguous())
    return left @ u[:, :rank], s[:rank], vh[:rank] @ basis.T, error, change


def randomized_svd(
    matrix: Tensor,
    rank: SupportsIndex,
    *,
    oversampling: int = 10,
    power_iterations: int | None = None,
    seed: int = 0,
) -> RandomizedSVD:
    """Approximate leading singular triplets of `matrix` [m, n] (Halko, Martinsson and Tropp, 2011).

    Subspace iteration from a Gaussian start of rank + oversampling columns, orthonormalised at every step.
    With `power_iterations` None it goes on, for 8 iterations at most, until the error ‖A − USVh‖ falls by
    less than 3e-4 of itself. It is then above the best error by about as much where the spectrum decays
    (even as k^-1/2), by three to four times `change` for pure noise, whose flat spectrum may need all eight.

    All arithmetic is in float64 on blocks of 128 MiB, so beside the matrix it takes about 8·(m + 3n)·(r + p)
    bytes and a block; 2(q + 1)·m·n·(r + p) multiply-adds for q power iterations. Parts have the dtype and
    device of `matrix`; the same seed gives the same bits.

    A rank above min(m, n) is clipped with a warning.

    Raises:
        ValueError: NaN, Inf, an empty or non-2-D matrix, a rank below 1, a negative oversampling or number of
            iterations.
        DecompositionError: no driver converges.
    """
    if oversampling < 0 or (power_iterations is not None and power_iterations < 0):
        raise ValueError(
            f"randomized_svd: oversampling and power_iterations must not be negative, got {oversampling} and "
            f"{power_iterations}"
        )
    checked = check_tensor(matrix, "randomized_svd: matrix", min_ndim=2, max_ndim=2).contiguous()
    used = check_rank(rank, min(checked.shape), "randomized_svd: rank")
    u, s, vh, error, change = randomized64(checked, used, oversampling, power_iterations, seed)
    u, s, vh = (part.to(matrix.device, matrix.dtype).contiguous() for part in (u, s, vh))
    return RandomizedSVD(u, s, vh, error, change)
