"""Tucker decompositions with chosen compressed modes: HOSVD, HOOI, and Tucker-2 of convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, SupportsIndex

from torch import Tensor

from .svd import CANCELLATION, leading_factor
from .unfolding import BLOCK_ELEMENTS, check_rank, check_tensor, expand, project, squared_norm

Factors = dict[int, Tensor]

# Multiply-adds that tucker2 spends on HOOI sweeps at most: about fifteen seconds on two cores. It stops short
# only kernels of the order of 4096 x 4096 x 3 x 3 without low-rank structure, whose later sweeps gain little.
SWEEP_WORK = 5 * 10**11

Solver = Callable[[Tensor, dict[int, int]], tuple[Tensor, Factors, list[float]]]


class HOSVDResult(NamedTuple):
    """`A ≈ core ×_n factors[n]` over the compressed modes n; factors[n] is [I_n, R_n], orthonormal."""

    core: Tensor
    factors: Factors


class HOOIResult(NamedTuple):
    """As HOSVDResult, with the relative error after every sweep."""

    core: Tensor
    factors: Factors
    relative_errors: list[float]


class Tucker2Factors(NamedTuple):
    """core [R_out, R_in, *k], factor_out [T, R_out], factor_in [S, R_in]; error of the float64 factors."""

    core: Tensor
    factor_out: Tensor
    factor_in: Tensor
    relative_error: float


def _check_modes(name: str, ndim: int, ranks: Sequence[SupportsIndex], modes: Sequence[int]) -> list[int]:
    if len(ranks) != len(modes) or not modes:
        raise ValueError(
            f"{name}: needs one rank for each mode, got ranks {list(ranks)} for modes {list(modes)}"
        )
    if any(not -ndim <= mode < ndim for mode in modes):
        raise ValueError(f"{name}: modes must be in [{-ndim}, {ndim - 1}], got {list(modes)}")
    wrapped = [mode % ndim for mode in modes]
    if len(set(wrapped)) != len(wrapped):
        raise ValueError(f"{name}: modes must differ, got {list(modes)}")
    return wrapped


def project_all(tensor: Tensor, factors: Factors, skip: int | None = None) -> Tensor:
    """`A ×_n U_nᵀ` for every mode but `skip`, the strongest reduction first."""
    order = sorted((m for m in factors if m != skip), key=lambda m: factors[m].shape[1] / factors[m].shape[0])
    for mode in order:
        tensor = project(tensor, mode, factors[mode])
    return tensor


def _relative_error(tensor: Tensor, total: float, core: Tensor, factors: Factors) -> float:
    """‖A − core ×_n U_n‖/‖A‖, by ‖A‖² − ‖core‖² unless that cancels; then by the residual, in blocks."""
    if total == 0.0:
        return 0.0
    missing = 1.0 - squared_norm(core) / total
    if missing > CANCELLATION:
        return math.sqrt(missing)
    first = min(factors)
    partial = core
    for mode in factors:
        if mode != first:
            partial = expand(partial, mode, factors[mode])
    rows = max(1, BLOCK_ELEMENTS * tensor.shape[first] // tensor.numel())
    residual = 0.0
    for i in range(0, tensor.shape[first], rows):
        part = tensor.narrow(first, i, min(rows, tensor.shape[first] - i))
        residual += squared_norm(part.double() - expand(partial, first, factors[first][i : i + rows]))
    return math.sqrt(residual / total)


def hosvd64(tensor: Tensor, ranks: dict[int, int]) -> tuple[Tensor, Factors, list[float]]:
    factors = {mode: leading_factor(tensor, mode, rank) for mode, rank in ranks.items()}
    core = project_all(tensor, factors)
    return core, factors, [_relative_error(tensor, squared_norm(tensor), core, factors)]


def hooi64(
    tensor: Tensor, ranks: dict[int, int], tol: float, max_sweeps: int
) -> tuple[Tensor, Factors, list[float]]:
    total = squared_norm(tensor)
    modes = list(ranks)
    # The first update overwrites the first factor without reading it, so that mode needs no HOSVD.
    factors = {mode: leading_factor(tensor, mode, ranks[mode]) for mode in modes[1:]}
    errors: list[float] = []
    for _ in range(max_sweeps):
        for mode in modes:
            reduced = project_all(tensor, factors, skip=mode)
            factors[mode] = leading_factor(reduced, mode, ranks[mode])
        core = project(reduced, modes[-1], factors[modes[-1]])
        errors.append(_relative_error(tensor, total, core, factors))
        if len(modes) == 1 or (len(errors) > 1 and abs(errors[-2] - errors[-1]) < tol):
            break
    return core, {mode: factors[mode] for mode in modes}, errors


def _sweep_limit(shape: Sequence[int], ranks: dict[int, int]) -> int:
    """Sweeps of Tucker-2 HOOI that fit in SWEEP_WORK, from 2 to 100."""
    numel = math.prod(shape)
    work = numel * sum(ranks.values())
    for mode, other in ((0, 1), (1, 0)):
        size = shape[mode]
        columns = numel // size // shape[other] * ranks[other]
        work += 2 * min(size, columns) ** 3  # eigenvectors run at about half the speed of products
    return max(2, min(100, SWEEP_WORK // work))


def _dense_order(tensor: Tensor) -> tuple[int, ...]:
    """Order of the dimensions in memory: lets a channels-last kernel be read where it lies."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    return order if tensor.permute(order).is_contiguous() else tuple(range(tensor.ndim))


def solve_in_memory_order(
    tensor: Tensor, ranks: dict[int, int], solver: Solver
) -> tuple[Tensor, Factors, list[float]]:
    """Run `solver` on the tensor in memory order and return core and factors in the order of the caller."""
    order = _dense_order(tensor)
    core, factors, errors = solver(
        tensor.permute(order).contiguous(), {order.index(mode): rank for mode, rank in ranks.items()}
    )
    inverse = [order.index(dim) for dim in range(tensor.ndim)]
    return core.permute(inverse), {order[mode]: factor for mode, factor in factors.items()}, errors


def _cast(like: Tensor, core: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
    def cast(part: Tensor) -> Tensor:
        return part.to(like.device, like.dtype).contiguous()

    return cast(core), {mode: cast(factor) for mode, factor in factors.items()}


def _prepare(
    name: str, tensor: Tensor, ranks: Sequence[SupportsIndex], modes: Sequence[int]
) -> tuple[Tensor, dict[int, int]]:
    checked = check_tensor(tensor, f"{name}: tensor", min_ndim=2)
    wrapped = _check_modes(name, checked.ndim, ranks, modes)
    clipped = {
        mode: check_rank(rank, checked.shape[mode], f"{name}: rank of mode {mode}")
        for mode, rank in zip(wrapped, ranks, strict=True)
    }
    return checked, clipped


def hosvd(tensor: Tensor, ranks: Sequence[SupportsIndex], modes: Sequence[int]) -> HOSVDResult:
    """Higher-order SVD over `modes`: U_n = leading left singular vectors of unfolding n, core = A ×_n U_nᵀ.

    The squared relative error is at most the sum over the modes of the discarded energy fractions (De
    Lathauwer, De Moor and Vandewalle, 2000). Computed in float64, cast to the dtype and device of `tensor`
    last. An unfolding I_n × M_n costs about I_n²·M_n/2 multiply-adds plus the eigenvectors of an I_n × I_n
    matrix.

    `ranks[i]` belongs to `modes[i]`; one above the mode size is clipped with a warning.

    Raises:
        ValueError: NaN, Inf, rank < 1, repeated or missing modes.
        DecompositionError: no driver converges.
    """
    checked, clipped = _prepare("hosvd", tensor, ranks, modes)
    core, factors, _ = solve_in_memory_order(checked, clipped, hosvd64)
    return HOSVDResult(*_cast(tensor, core, factors))


def hooi(
    tensor: Tensor,
    ranks: Sequence[SupportsIndex],
    modes: Sequence[int],
    tol: float = 1e-5,
    max_sweeps: int = 100,
) -> HOOIResult:
    """Higher-order orthogonal iteration over `modes`, started from the HOSVD.

    Cycles U_n ← leading left singular vectors of unfold_n(A ×_{m≠n} U_mᵀ) (De Lathauwer, De Moor and
    Vandewalle, 2000). The error never increases from sweep to sweep; the iteration stops when the fit
    1 − relative error changes by less than `tol`, or after `max_sweeps` sweeps. A sweep costs numel·ΣR_n
    multiply-adds plus the decompositions of the reduced unfoldings.

    Arguments, casts and errors as `hosvd`; ValueError too for max_sweeps < 1.
    """
    if max_sweeps < 1:
        raise ValueError(f"hooi: max_sweeps must be at least 1, got {max_sweeps}")
    checked, clipped = _prepare("hooi", tensor, ranks, modes)
    core, factors, errors = solve_in_memory_order(
        checked, clipped, lambda a, r: hooi64(a, r, tol, max_sweeps)
    )
    return HOOIResult(*_cast(tensor, core, factors), errors)


def tucker2(
    weight: Tensor,
    rank_out: SupportsIndex,
    rank_in: SupportsIndex,
    method: Literal["hooi", "hosvd"] = "hooi",
) -> Tucker2Factors:
    """Tucker-2 form of a convolution kernel [T, S, *k] with one to three spatial dimensions.

    W[t, s, ...] = Σ_ba core[b, a, ...] factor_out[t, b] factor_in[s, a] (Kim et al., 2016). Same mode order
    as `tensorly.decomposition.partial_tucker(weight, [rank_out, rank_in], modes=[0, 1])`. Both factors have
    orthonormal columns. relative_error = ‖W − Ŵ‖/‖W‖, of the float64 factors before the cast.

    HOOI stops at a fit change below 1e-5, at 100 sweeps, or where the sweeps of a huge kernel would take more
    than 5e11 multiply-adds (two sweeps at least). Cost as `hooi`.

    Ranks above T or S are clipped with a warning.

    Raises:
        ValueError: NaN, Inf, rank < 1, a kernel without spatial dimensions or an unknown method.
        DecompositionError: no driver converges.
    """
    if method not in ("hooi", "hosvd"):
        raise ValueError(f"tucker2: method must be 'hooi' or 'hosvd', got {method!r}")
    checked = check_tensor(weight, "tucker2: weight", min_ndim=3, max_ndim=5)
    ranks = {
        0: check_rank(rank_out, checked.shape[0], "tucker2: rank_out"),
        1: check_rank(rank_in, checked.shape[1], "tucker2: rank_in"),
    }
    limit = _sweep_limit(checked.shape, ranks)
    solver = hosvd64 if method == "hosvd" else (lambda a, r: hooi64(a, r, 1e-5, limit))
    core, factors, errors = solve_in_memory_order(checked, ranks, solver)
    core, factors = _cast(weight, core, factors)
    return Tucker2Factors(core, factors[0], factors[1], errors[-1])
