"""A matrix as the product of two thin ones."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, SupportsIndex

from torch import Tensor

from .randomized import SETTLED, randomized64
from .svd import CANCELLATION, truncated_svd64
from .unfolding import check_rank, check_tensor, residual_of_product, squared_norm

# min(m, n)²·max(m, n) from which "auto" tries the randomised way; the exact one then takes seconds and more.
LARGE_SVD_WORK = 1 << 37
# … and only for ranks below this share of min(m, n), where it costs a fraction of the exact one.
SMALL_RANK_SHARE = 1 / 8
OVERSAMPLING = 16

SVDMethod = Literal["auto", "exact", "randomized"]


class SVDFactors(NamedTuple):
    """`W ≈ a @ b`: a = U diag(S) [M, R], b = Vh [R, N]; relative_error is that of the float64 factors."""

    a: Tensor
    b: Tensor
    relative_error: float


def _matrix_error(matrix: Tensor, s: Tensor, u: Tensor, vh: Tensor) -> float:
    """‖A − U diag(S) Vh‖/‖A‖ from norms alone, or from the residual where those would cancel."""
    total = squared_norm(matrix)
    if total == 0.0:
        return 0.0
    missing = 1.0 - squared_norm(s) / total
    if missing > CANCELLATION:
        return math.sqrt(missing)
    return math.sqrt(residual_of_product(matrix, u * s, vh) / total)


def _parts(matrix: Tensor, rank: int, method: SVDMethod) -> tuple[Tensor, Tensor, Tensor]:
    small, large = sorted(matrix.shape)
    worthwhile = small * small * large >= LARGE_SVD_WORK and rank + OVERSAMPLING <= SMALL_RANK_SHARE * small
    if method == "randomized" or (method == "auto" and worthwhile):
        u, s, vh, _, change = randomized64(matrix, rank, OVERSAMPLING, None, 0)
        if method == "randomized" or change < SETTLED:
            return u, s, vh
    return truncated_svd64(matrix, rank)


def svd_factors(weight: Tensor, rank: SupportsIndex, *, method: SVDMethod = "auto") -> SVDFactors:
    """Two-factor form `W = a @ b` of a linear weight: a = U diag(S) [M, R], b = Vh [R, N].

    `weight` is [M, N] in torch order (outputs first). A layer built from it costs R·(M + N) multiply-adds a
    row. relative_error = ‖W − a b‖ / ‖W‖, of the float64 factors before the cast.

    "exact" is `truncated_svd`, "randomized" is `randomized_svd`. "auto" is randomised for large matrices
    (min²·max from 2³⁷) at ranks below an eighth of the smaller side, where its last iteration lowered the
    error by less than 1e-3 of itself, and exact for all others. What it keeps is above the best error by
    about 1e-3 of it at most where the spectrum decays, by up to 4e-3 for pure noise; "exact" is the way to
    the last digits. Errors as `truncated_svd`; ValueError too for an unknown method.
    """
    if method not in ("auto", "exact", "randomized"):
        raise ValueError(f"svd_factors: method must be 'auto', 'exact' or 'randomized', got {method!r}")
    checked = check_tensor(weight, "svd_factors: weight", min_ndim=2, max_ndim=2).contiguous()
    rank = check_rank(rank, min(checked.shape), "svd_factors: rank")
    u, s, vh = _parts(checked, rank, method)
    error = _matrix_error(checked, s, u, vh)
    a, b = ((part.to(weight.device, weight.dtype)).contiguous() for part in (u * s, vh))
    return SVDFactors(a, b, error)
