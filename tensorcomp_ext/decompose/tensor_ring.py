"""Tensor rings: TR-SVD where the first mode is large enough for two ranks, alternating least squares else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .chain_ranks import ChainRanks, ring_ranks
from .ring_als import best_start64
from .svd import leading_factor
from .tensor_train import chain_residual, check_matrix, interleave, split_modes, sweep
from .unfolding import check_tensor, project, squared_norm

SWEEPS = 100
TOLERANCE = 1e-6
RESTARTS = 3
# A ring that is exact to this needs no least squares.
EXACT = 1e-13

RingMethod = Literal["auto", "svd", "als"]


class TensorRing(NamedTuple):
    """Cores [R_k, n_k, R_{k+1}] (TR-matrix: [R_k, out_k, in_k, R_{k+1}]) with R_d = R_0.

    relative_error = ‖A − Â‖/‖A‖ of the float64 cores, before the cast.
    """

    cores: tuple[Tensor, ...]
    relative_error: float


def _error(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    total = squared_norm(tensor)
    return math.sqrt(chain_residual(tensor, cores) / total) if total else 0.0


def _svd64(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """TR-SVD at ranks with R_0·R_1 at most the first mode."""
    first, second, size = ranks[0], ranks[1], tensor.shape[0]
    matrix = tensor.reshape(size, -1)
    left = leading_factor(matrix, 0, first * second)  # [n_1, (R_0, R_1)]
    # A library is free in the signs of singular vectors, and the truncations to come depend on them: the
    # largest entry is made positive, so that every library gives one ring.
    left = left * left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    rest = project(matrix, 0, left).reshape(first, second, -1).movedim(0, 2)  # [R_1, rest, R_0]
    opening = left.reshape(size, first, second).transpose(0, 1)
    return [opening, *sweep(rest.contiguous(), tensor.shape[1:], ranks[2:], second)]


def _rotation(sizes: Sequence[int], ranks: Sequence[int]) -> int | None:
    """The mode from which TR-SVD can start and keeps the largest share of its unfolding."""
    modes = len(sizes)
    fits = [k for k in range(modes) if ranks[k] * ranks[(k + 1) % modes] <= sizes[k]]
    return max(fits, key=lambda k: ranks[k] * ranks[(k + 1) % modes] / sizes[k], default=None)


def _rotated_svd(tensor: Tensor, ranks: Sequence[int], start: int) -> list[Tensor]:
    """TR-SVD begun at mode `start`, its cores given in the order of the modes."""
    modes = tensor.ndim
    order = [(start + k) % modes for k in range(modes)]
    cores = _svd64(tensor.permute(order).contiguous(), [ranks[k] for k in order])
    return [cores[(k - start) % modes] for k in range(modes)]


def _random_cores(
    sizes: Sequence[int], ranks: Sequence[int], norm: float, generator: torch.Generator
) -> list[Tensor]:
    """Random cores whose ring has about the given norm."""
    modes = len(sizes)
    scale = norm / math.sqrt(math.prod(sizes) * math.prod(ranks))
    return [
        torch.randn(ranks[k], sizes[k], ranks[(k + 1) % modes], dtype=torch.float64, generator=generator)
        * scale ** (1 / modes)
        for k in range(modes)
    ]


def _single(tensor: Tensor, rank: int) -> list[Tensor]:
    """A ring of one core: the trace of G[:, i, :], which a multiple of the identity gives exactly."""
    return [torch.einsum("i,ab->aib", tensor.double(), torch.eye(rank, dtype=torch.float64)) / rank]


class _Search(NamedTuple):
    """How `tr_als` searches: its checked options."""

    ridge: float
    sweeps: int
    tol: float
    restarts: int
    seed: int

    def cores(
        self, tensor: Tensor, ranks: Sequence[int], first: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], float]:
        """The best ring from random cores and, where given, from these first ones."""
        if tensor.ndim == 1:
            cores = _single(tensor, ranks[0])
            return cores, _error(tensor, cores)
        generator = torch.Generator().manual_seed(self.seed)
        norm = math.sqrt(squared_norm(tensor))
        fixed = [] if first is None else [first]
        fit = best_start64(
            tensor.double(),
            fixed,
            [_random_cores(tensor.shape, ranks, norm, generator) for _ in range(self.restarts - len(fixed))],
            ridge=self.ridge,
            sweeps=self.sweeps,
            tol=self.tol,
        )
        return fit.cores, fit.relative_errors[-1]


def _cast(cores: Sequence[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(core.to(like.device, like.dtype).contiguous() for core in cores)


def _search(name: str, **options: float) -> _Search:
    unknown = sorted(set(options) - set(_Search._fields))
    if unknown:
        raise TypeError(
            f"{name}: options are ridge, sweeps, tol, restarts and seed, got {', '.join(unknown)}"
        )
    ridge, tol = float(options.get("ridge", 0.0)), float(options.get("tol", TOLERANCE))
    sweeps, restarts = int(options.get("sweeps", SWEEPS)), int(options.get("restarts", RESTARTS))
    for option, count in (("sweeps", sweeps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name}: {option} must be at least 1, got {count}")
    for option, value in (("ridge", ridge), ("tol", tol)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: {option} must be finite and not negative, got {value}")
    return _Search(ridge, sweeps, tol, restarts, int(options.get("seed", 0)))


def tr_svd(tensor: Tensor, ranks: ChainRanks) -> TensorRing:
    """Tensor ring `A[i_1 … i_d] ≈ trace Π_k G_k[:, i_k, :]` by successive SVDs (Zhao et al., 2016).

    The SVD of the n_1 × rest unfolding at rank R_0·R_1 is split into both bonds of the first core; the rest
    is a TT sweep that closes with R_0. Needs R_0·R_1 ≤ n_1. Cost as `tt_svd`. `ranks`: an int or (R_0 …
    R_{d-1}), clipped as `ring_ranks` says. Computed in float64, cast to the dtype and device of `tensor`
    last.

    Raises:
        ValueError: NaN, Inf, fewer than two modes, wrong ranks, and where R_0·R_1 exceeds n_1 (`tr_als` has
            no such limit).
        DecompositionError: no driver converges.
    """
    checked = check_tensor(tensor, "tr_svd: tensor", min_ndim=2).contiguous()
    used = ring_ranks(checked.shape, ranks, "tr_svd: ranks")
    if used[0] * used[1] > checked.shape[0]:
        raise ValueError(
            f"tr_svd: R_0·R_1 must be at most n_1 = {checked.shape[0]}, got {used[0]}·{used[1]}; use tr_als"
        )
    cores = _svd64(checked, used)
    return TensorRing(_cast(cores, tensor), _error(checked, cores))


def tr_als(
    tensor: Tensor,
    ranks: ChainRanks,
    *,
    ridge: float = 0.0,
    sweeps: int = SWEEPS,
    tol: float = TOLERANCE,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> TensorRing:
    """Tensor ring by alternating least squares from random cores (Zhao et al., 2016).

    Each core in turn is the least-squares solution of its unfolding against the merged other cores. The
    normal equations come from transfer matrices, so the design matrix is not formed; where they are
    ill-conditioned (Cholesky diagonal spanning more than 1e6) the design matrix, reduced by a QR of the
    other half of the ring, is factorised with column pivoting instead. A sweep costs about 3·numel·R² + d·R⁶
    multiply-adds.

    The first seven sweeps of a start are under a ridge (ours) that falls from 0.1 to 1e-4 (fewer than 14
    sweeps: their first half); after them, without `ridge`, the error never increases. Of several starts all
    take ten sweeps more and only the one of least error goes on. The problem has local minima: of planted
    rings some are found from no start, more so where the ranks are near the sizes of the modes.

    Args:
        ranks: an int or (R_0 … R_{d-1}), clipped as `ring_ranks` says
        ridge: added to the normal equations, relative to the mean of their diagonal (1e-8 tames cores that
            grow)
        sweeps, tol: stop after so many sweeps, or when the relative error or its change falls below tol
        restarts, seed: how many random starts, and what they are drawn from

    Raises:
        ValueError: NaN, Inf, wrong ranks, a negative ridge or tol, no sweep, no start.
        DecompositionError: the least squares fail.
    """
    search = _search("tr_als", ridge=ridge, sweeps=sweeps, tol=tol, restarts=restarts, seed=seed)
    checked = check_tensor(tensor, "tr_als: tensor", min_ndim=1).contiguous()
    used = ring_ranks(checked.shape, ranks, "tr_als: ranks")
    cores, error = search.cores(checked, used, None)
    return TensorRing(_cast(cores, tensor), error)


def _ring64(
    name: str, tensor: Tensor, ranks: Sequence[int], method: RingMethod, options: dict[str, float]
) -> tuple[list[Tensor], float]:
    """`tensor_ring` of a checked contiguous tensor."""
    if method not in ("auto", "svd", "als"):
        raise ValueError(f"{name}: method must be 'auto', 'svd' or 'als', got {method!r}")
    search = _search(name, **options)
    rotation = None if method == "als" or tensor.ndim == 1 else _rotation(tensor.shape, ranks)
    if rotation is None:
        if method == "svd":
            raise ValueError(
                f"{name}: method 'svd' needs a mode n_k ≥ R_k·R_k+1, got modes {tuple(tensor.shape)} and "
                f"{tuple(ranks)}; use 'als'"
            )
        return search.cores(tensor, ranks, None)
    cores = _rotated_svd(tensor, ranks, rotation)
    error = _error(tensor, cores)
    if method == "svd" or error < EXACT:
        return cores, error
    improved, smaller = search.cores(tensor, ranks, cores)
    return (improved, smaller) if smaller <= error else (cores, error)


def tensor_ring(
    tensor: Tensor, ranks: ChainRanks, method: RingMethod = "auto", **options: float
) -> TensorRing:
    """Tensor ring of `tensor` [n_1, …, n_d]: cores [R_k, n_k, R_{k+1}].

    "svd": TR-SVD begun at a mode with R_k·R_{k+1} ≤ n_k. "als": `tr_als`. "auto": TR-SVD where there is
    such a mode, improved by least squares (the error never increases) or outdone by one of restarts − 1
    random starts; else `tr_als`. `options`: ridge, sweeps, tol, restarts and seed of `tr_als`. Errors as
    `tr_als`; ValueError too for "svd" where no mode is large enough.
    """
    checked = check_tensor(tensor, "tensor_ring: tensor", min_ndim=1).contiguous()
    used = ring_ranks(checked.shape, ranks, "tensor_ring: ranks")
    cores, error = _ring64("tensor_ring", checked, used, method, options)
    return TensorRing(_cast(cores, tensor), error)


def tr_matrix(
    matrix: Tensor,
    ranks: ChainRanks,
    out_modes: Sequence[SupportsIndex],
    in_modes: Sequence[SupportsIndex],
    method: RingMethod = "auto",
    **options: float,
) -> TensorRing:
    """TR-matrix `W[(o_1…o_d), (i_1…i_d)] ≈ trace Π_k G_k[:, o_k, i_k, :]`: a TTM with a closed ring.

    `tensor_ring` of the entries reordered to modes o_k·i_k; cores [R_k, o_k, i_k, R_{k+1}]. Method, options
    and errors as there; ValueError too where the modes do not multiply to the shape.
    """
    checked, outs, ins = check_matrix("tr_matrix", matrix, out_modes, in_modes)
    tensor = interleave(checked, outs, ins)
    used = ring_ranks(tensor.shape, ranks, "tr_matrix: ranks")
    cores, error = _ring64("tr_matrix", tensor, used, method, options)
    return TensorRing(split_modes(cores, outs, ins, matrix), error)
