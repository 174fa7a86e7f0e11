"""Tucker decomposition in all modes of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .tucker import hooi64, hosvd64, solve_in_memory_order
from .unfolding import check_rank, check_tensor

HOOI_TOLERANCE = 1e-5
HOOI_SWEEPS = 100


class Tucker(NamedTuple):
    """`A ≈ core ×_1 U_1 … ×_d U_d`: core [R_1, …, R_d], factors[n] [I_n, R_n] with orthonormal columns.

    relative_error = ‖A − Â‖/‖A‖ of the float64 factors, before the cast.
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    relative_error: float


def tucker_ranks(
    sizes: Sequence[int], ranks: SupportsIndex | Sequence[SupportsIndex], name: str
) -> tuple[int, ...]:
    """One rank a mode, clipped to the mode with a warning; a single int warns only if no mode can hold it."""
    if not isinstance(ranks, (tuple, list)):
        one = check_rank(ranks, max(sizes), name)  # type: ignore[arg-type]
        return tuple(min(one, size) for size in sizes)
    if len(ranks) != len(sizes):
        raise ValueError(f"{name} must be an int or {len(sizes)} ranks for {len(sizes)} modes, got {ranks}")
    return tuple(
        check_rank(rank, size, f"{name}[{mode}]")
        for mode, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    )


def tucker64(
    tensor: Tensor, ranks: Sequence[int], method: Literal["hooi", "hosvd"] = "hooi"
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """`tucker` of a checked tensor at clipped ranks: float64 core and factors, relative error."""
    # A mode at full rank takes no part: any orthogonal factor serves, and the identity costs nothing.
    compressed = {mode: rank for mode, rank in enumerate(ranks) if rank < tensor.shape[mode]}
    factors = {
        mode: torch.eye(size, dtype=torch.float64)
        for mode, size in enumerate(tensor.shape)
        if mode not in compressed
    }
    if not compressed:
        return tensor.double(), tuple(factors[mode] for mode in range(tensor.ndim)), 0.0
    if method == "hosvd":
        core, found, errors = solve_in_memory_order(tensor, compressed, hosvd64)
    else:
        core, found, errors = solve_in_memory_order(
            tensor, compressed, lambda a, r: hooi64(a, r, HOOI_TOLERANCE, HOOI_SWEEPS)
        )
    factors |= found
    return core, tuple(factors[mode] for mode in range(tensor.ndim)), errors[-1]


def tucker(
    tensor: Tensor,
    ranks: SupportsIndex | Sequence[SupportsIndex],
    *,
    method: Literal["hooi", "hosvd"] = "hooi",
) -> Tucker:
    """Tucker form in all modes: `A[i_1 … i_d] ≈ Σ core[r_1 … r_d] Π_n U_n[i_n, r_n]` (Tucker, 1966).

    HOSVD, then HOOI until the fit changes by less than 1e-5, for 100 sweeps at most; the error never
    increases and its square is at most the sum over the modes of the discarded energy fractions. A mode at
    full rank gets the identity. Computed in float64, cast to the dtype and device of `tensor` last. Cost as
    `hooi`.

    `ranks`: an int for all modes, or one a mode; clipped to the modes, with a warning (for a single int
    only if no mode can hold it).

    Raises:
        ValueError: NaN, Inf, an empty tensor, wrong ranks or an unknown method.
        DecompositionError: no driver converges.
    """
    if method not in ("hooi", "hosvd"):
        raise ValueError(f"tucker: method must be 'hooi' or 'hosvd', got {method!r}")
    checked = check_tensor(tensor, "tucker: tensor", min_ndim=1)
    used = tucker_ranks(checked.shape, ranks, "tucker: ranks")
    core, factors, error = tucker64(checked, used, method)
    parts = [part.to(tensor.device, tensor.dtype).contiguous() for part in (core, *factors)]
    return Tucker(parts[0], tuple(parts[1:]), error)
