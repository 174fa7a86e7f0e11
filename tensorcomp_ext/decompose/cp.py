"""CP decomposition by alternating least squares with restarts and a guard against degenerate components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .solve import solve_normal
from .svd import CANCELLATION, leading_factor
from .tensor_train import middle_cut
from .unfolding import check_rank, check_tensor, residual_of_product, squared_norm

RIDGE = 1e-10
"""ε of the normal equations, as a share of the mean of their diagonal."""
LARGEST_RIDGE = 1e-2
LARGEST_WEIGHT = 1e3
"""Norm of a component, as a multiple of ‖A‖, above which the fit counts as degenerate."""
TRIAL_SWEEPS = 20
"""Sweeps of every start before only the best goes on."""


class CP(NamedTuple):
    """`A[i_1 … i_d] ≈ Σ_r Π_n factors[n][i_n, r]`, factors[n] [I_n, R]; the weights are spread over all
    factors.

    relative_error = ‖A − Â‖/‖A‖ of the float64 factors, before the cast.
    """

    factors: tuple[Tensor, ...]
    relative_error: float


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product [Π I_n, R], the rows in row-major order of the modes."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).reshape(-1, factor.shape[1])
    return product


def cp_residual(tensor: Tensor, factors: Sequence[Tensor]) -> float:
    """‖A − Â‖², formed in blocks from the Khatri-Rao products of two halves of the modes."""
    if len(factors) == 1:
        return squared_norm(tensor.double() - factors[0].sum(1))
    cut = middle_cut(tensor.shape)
    left, right = khatri_rao(factors[:cut]), khatri_rao(factors[cut:])
    return residual_of_product(tensor.reshape(left.shape[0], -1), left, right.T.contiguous())


def _contract(partial: Tensor, factors: Sequence[Tensor], skip: int) -> Tensor:
    """Σ over all modes of the group but `skip` of partial [I_a, …, I_b, R] times the factors: [I_skip, R]."""
    rank = partial.shape[-1]
    result = partial.reshape(*(factor.shape[0] for factor in factors), rank)
    for _ in range(len(factors) - 1 - skip):
        result = torch.einsum("...ir,ir->...r", result, factors[result.dim() - 2])
    for factor in factors[:skip]:
        result = torch.einsum("ir,i...r->...r", factor, result)
    return result


class _Fit:
    """Factors with columns of norm one, the norms of the components, and the errors they left so far."""

    def __init__(self, tensor: Tensor, total: float, factors: list[Tensor], ridge: float = RIDGE) -> None:
        self.tensor, self.total, self.factors, self.ridge = tensor, total, factors, ridge
        self.cut = middle_cut(tensor.shape)
        self.matrix = tensor.reshape(math.prod(tensor.shape[: self.cut]), -1)
        self.weights = torch.ones(factors[0].shape[1], dtype=torch.float64)
        self.grams = [factor.T @ factor for factor in factors]
        self.best, self.least, self.errors = self.spread(), math.inf, list[float]()
        self.settled = False

    def sweep(self, ridge: float) -> float:
        """Solve for every factor once; the relative error afterwards."""
        inner = norms = 0.0
        for side in (0, 1):
            here = range(self.cut) if side == 0 else range(self.cut, len(self.factors))
            there = self.factors[self.cut :] if side == 0 else self.factors[: self.cut]
            partial = (self.matrix if side == 0 else self.matrix.T) @ khatri_rao(there)
            for mode in here:
                target = _contract(partial, self.factors[here.start : here.stop], mode - here.start)
                gram = torch.ones_like(self.grams[0])
                for other, part in enumerate(self.grams):
                    if other != mode:
                        gram = gram * part
                shift = ridge * float(gram.trace()) / gram.shape[0]
                scaled = solve_normal(gram + shift * torch.eye(gram.shape[0], dtype=torch.float64), target)
                inner = float((scaled * target).sum())
                norms = float(((scaled @ gram) * scaled).sum())
                self.weights = scaled.norm(dim=0)
                self.factors[mode] = scaled / torch.where(self.weights > 0, self.weights, 1.0)
                self.grams[mode] = self.factors[mode].T @ self.factors[mode]
        missing = 1.0 - (2.0 * inner - norms) / self.total
        if missing <= CANCELLATION:
            missing = cp_residual(self.tensor, self.spread()) / self.total
        return math.sqrt(missing)

    def spread(self) -> list[Tensor]:
        """The factors with the weights of the components shared evenly among them."""
        share = self.weights ** (1.0 / len(self.factors))
        return [factor * share for factor in self.factors]

    def go_on(self, sweeps: int, tol: float) -> None:
        """Sweep until there are `sweeps` in all, or the error changes by less than tol."""
        errors = self.errors
        while len(errors) < sweeps and not self.settled:
            errors.append(self.sweep(self.ridge))
            if errors[-1] < self.least:
                self.best, self.least = self.spread(), errors[-1]
            if float(self.weights.max()) > LARGEST_WEIGHT * math.sqrt(self.total):
                # Components that grow and cancel: more ridge until they stay within bounds.
                self.ridge = min(10.0 * self.ridge, LARGEST_RIDGE)
            else:
                self.settled = len(errors) > 1 and abs(errors[-2] - errors[-1]) < tol


def _start(tensor: Tensor, rank: int, generator: torch.Generator | None) -> list[Tensor]:
    """Random factors, or without generator the leading singular vectors, random where there are too few."""
    fill = generator or torch.Generator().manual_seed(0)
    factors = []
    for mode, size in enumerate(tensor.shape):
        factor = torch.randn(size, rank, dtype=torch.float64, generator=fill)
        if generator is None:
            known = min(size, rank)
            factor[:, :known] = leading_factor(tensor, mode, known)
        factors.append(factor / factor.norm(dim=0))
    return factors


def cp_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """The leading singular vectors of the unfoldings of a float64 tensor, filled up with random columns."""
    return _start(tensor, rank, None)


def cp_sweep(tensor: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The factors after one sweep of ALS from `factors`, for a float64 tensor of at least two modes."""
    fit = _Fit(tensor, max(squared_norm(tensor), torch.finfo(torch.float64).tiny), list(factors))
    fit.sweep(RIDGE)
    return fit.spread()


def als64(
    tensor: Tensor, start: list[Tensor], *, sweeps: int, tol: float, ridge: float = RIDGE
) -> tuple[list[Tensor], list[float]]:
    """CP-ALS from `start` for a float64 tensor of at least two modes: best factors, error of every sweep."""
    fit = _Fit(tensor, squared_norm(tensor), start, ridge)
    fit.go_on(sweeps, tol)
    return fit.best, fit.errors


def cp64(
    tensor: Tensor, rank: int, *, restarts: int, sweeps: int, tol: float, seed: int
) -> tuple[list[Tensor], float]:
    """`cp_als` of a checked contiguous tensor: float64 factors and the relative error."""
    exact = tensor.double()
    total = squared_norm(exact)
    if total == 0.0:
        return [torch.zeros(size, rank, dtype=torch.float64) for size in tensor.shape], 0.0
    if tensor.ndim == 1:
        return [exact[:, None].repeat(1, rank) / rank], 0.0
    generator = torch.Generator().manual_seed(seed)
    kept: _Fit | None = None
    for attempt in range(restarts):
        fit = _Fit(exact, total, _start(exact, rank, generator if attempt else None))
        fit.go_on(sweeps if restarts == 1 else min(sweeps, TRIAL_SWEEPS), tol)
        if kept is None or fit.least < kept.least:
            kept = fit
    assert kept is not None  # there is at least one start
    kept.go_on(sweeps, tol)
    return kept.best, math.sqrt(cp_residual(exact, kept.best) / total)


def cp_als(
    tensor: Tensor,
    rank: SupportsIndex,
    *,
    restarts: int = 3,
    sweeps: int = 200,
    tol: float = 1e-7,
    seed: int = 0,
) -> CP:
    """CP form `A[i_1 … i_d] ≈ Σ_r Π_n U_n[i_n, r]` by alternating least squares (Carroll and Chang, 1970).

    U_n ← unfold_n(A)·KR·(⊛ Gram + εI)⁻¹ with ε = 1e-10·trace/R, columns normalised after every update,
    weights spread evenly over the factors at the end. The first start is the leading singular vectors of
    the unfoldings, the others are random; of several, all take 20 sweeps and only the one of least error
    goes on, so a start that would have overtaken it later is lost. A start ends when the relative error
    changes by less than `tol` or after `sweeps` sweeps. Where a component's norm passes 1000·‖A‖
    (degenerate fits, whose components grow and cancel) ε is raised tenfold a sweep, to 1e-2 at most.

    The modes form two groups; one product of the tensor with a group's Khatri-Rao product serves all modes
    of the other: 2·numel·R multiply-adds a sweep. Computed in float64, cast to the dtype and device of
    `tensor` last.

    The rank may exceed every mode and is clipped, with a warning, to numel divided by the largest mode, at
    which every tensor is exact.

    Raises:
        ValueError: NaN, Inf, an empty tensor, a rank, restarts or sweeps below 1, a negative tol.
        DecompositionError: the least squares fail.
    """
    for name, count in (("restarts", restarts), ("sweeps", sweeps)):
        if count < 1:
            raise ValueError(f"cp_als: {name} must be at least 1, got {count}")
    if not 0.0 <= tol < math.inf:
        raise ValueError(f"cp_als: tol must be finite and not negative, got {tol}")
    checked = check_tensor(tensor, "cp_als: tensor", min_ndim=1).contiguous()
    used = check_rank(rank, largest_cp_rank(checked.shape), "cp_als: rank")
    factors, error = cp64(checked, used, restarts=restarts, sweeps=sweeps, tol=tol, seed=seed)
    return CP(tuple(f.to(tensor.device, tensor.dtype).contiguous() for f in factors), error)


def largest_cp_rank(sizes: Sequence[int]) -> int:
    """A rank at which every tensor has an exact CP form: the product of all modes but the largest."""
    return math.prod(sizes) // max(sizes)
