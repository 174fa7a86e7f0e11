"""Alternating least squares for a tensor ring, on two matrices of half the modes each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .solve import solve_normal
from .tensor_train import chain_product, chain_residual, middle_cut
from .unfolding import squared_norm

# Ridges of the first sweeps from random cores.
FALLING_RIDGES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
# Sweeps of every start, those under a falling ridge not counted, before only the best goes on.
TRIAL_SWEEPS = 10


class RingFit(NamedTuple):
    """Cores [R_k, n_k, R_{k+1}] in float64 and the relative error after every sweep."""

    cores: list[Tensor]
    relative_errors: list[float]


def _transfer(left: Tensor, core: Tensor) -> Tensor:
    """Append a core to a product of transfer matrices: [p, a, a'] → [p, b, b'], a sum over a, a' and i."""
    pairs, rank, _ = left.shape
    size, after = core.shape[1:]
    half = left.movedim(2, 1).reshape(-1, rank) @ core.reshape(rank, -1)  # [(p, a'), (i, b)]
    half = half.reshape(pairs, rank * size, after).transpose(1, 2)  # [p, b, (a', i)]
    return half @ core.reshape(rank * size, after)


def _transfer_of(cores: Sequence[Tensor], first: int) -> Tensor:
    """Product of the transfer matrices of neighbouring cores, [(a, a'), b, b'] with a of size `first`."""
    product = torch.eye(first * first, dtype=torch.float64).reshape(first * first, first, first)
    for core in cores:
        product = _transfer(product, core)
    return product


def _merged(cores: Sequence[Tensor], rank: int) -> Tensor:
    """The product of the cores [r, n, r'], or the identity [rank, 1, rank] where there is none."""
    return chain_product(cores) if cores else torch.eye(rank, dtype=torch.float64).reshape(rank, 1, rank)


class _Half:
    """One half of the tensor as the other half of the ring lets it be seen."""

    def __init__(self, matrix: Tensor, other: Sequence[Tensor], first: int, last: int) -> None:
        # `first` and `last` are the outer bonds of the half being solved; the other runs from last to first.
        self.matrix, self.other, self.first, self.last = matrix, other, first, last
        merged = chain_product(other)  # [last, n_other, first]
        self.weights = merged.transpose(0, 1).reshape(merged.shape[1], last * first)
        self.partial = matrix @ self.weights  # [n_half, last · first]
        self.outside = _transfer_of(other, last).reshape(last * last, first * first)
        self._reduced: tuple[Tensor, Tensor] | None = None

    def reduced(self) -> tuple[Tensor, Tensor]:
        """The half in an orthonormal basis of what the other spans, [n_half, q], and its triangle."""
        if self._reduced is None:
            basis, triangle = torch.linalg.qr(self.weights)
            self._reduced = self.matrix @ basis, triangle
        return self._reduced


def _design(half: _Half, left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Design matrix [n_l · n_r · q, before · after] of one core and its targets [n_l · n_r · q, n]."""
    reduced, triangle = half.reduced()
    columns = triangle.reshape(-1, half.last, half.first)
    matrix = torch.einsum("flb,arz,qzf->lrqba", left, right, columns)
    targets = reduced.reshape(left.shape[1], size, right.shape[1], -1).permute(0, 2, 3, 1)
    rows = math.prod(matrix.shape[:3])
    return matrix.reshape(rows, -1), targets.reshape(rows, size)


def _update(index: int, cores: list[Tensor], half: _Half, ridge: float) -> None:
    """Replace `cores[index]`, a core of this half, by its least-squares optimum."""
    core = cores[index]
    before, size, after = core.shape
    first, last = half.first, half.last
    left, right = _merged(cores[:index], first), _merged(cores[index + 1 :], last)
    # [n_l, n, n_r, last, first] · left[first, n_l, before] · right[after, n_r, last] → [before, n, after]
    shaped = half.partial.reshape(left.shape[1], -1, last, first).permute(3, 0, 1, 2)
    rhs = left.reshape(-1, before).T @ shaped.reshape(first * left.shape[1], -1)  # [before, (n, n_r, last)]
    rhs = rhs.reshape(before * size, -1) @ right.permute(1, 2, 0).reshape(-1, after)
    rhs = rhs.reshape(before, size, after).transpose(0, 1).reshape(size, before * after)

    # Around the ring from the bond behind the core to the bond before it: [(after, after'), before, before'].
    chain = _transfer_of(cores[index + 1 :], after)
    chain = (chain.reshape(after * after, -1) @ half.outside).reshape(after * after, first, first)
    for earlier in cores[:index]:
        chain = _transfer(chain, earlier)
    gram = chain.reshape(after, after, before, before).permute(2, 0, 3, 1).reshape(before * after, -1)
    gram = (gram + gram.T) / 2
    unfolded = core.transpose(0, 1).reshape(size, -1)
    if ridge:
        shift = ridge * float(gram.trace()) / gram.shape[0]
        found = solve_normal(gram + shift * torch.eye(gram.shape[0], dtype=torch.float64), rhs)
    else:
        rows = left.shape[1] * right.shape[1] * min(half.weights.shape)
        found = solve_normal(
            gram, rhs, lambda: _design(half, left, right, size), rows * (before * after) ** 2
        )

    def objective(x: Tensor) -> float:
        return float(torch.sum((x @ gram - 2.0 * rhs) * x))

    # Rounding in ill-conditioned equations must not undo what earlier sweeps achieved.
    if objective(found) <= objective(unfolded):
        cores[index] = found.reshape(size, before, after).transpose(0, 1).contiguous()
        _rescale(cores, index)


def _rescale(cores: list[Tensor], index: int) -> None:
    """Give all cores of the half the same norm: scales that drift apart would end in overflow."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0.0:
        return
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    for k, norm in enumerate(norms):
        cores[k] = cores[k] * (mean / norm)


def ring_als64(tensor: Tensor, start: Sequence[Tensor], *, ridge: float, sweeps: int, tol: float) -> RingFit:
    """ALS over the cores of a ring from `start`, for a float64 tensor of at least two modes.

    The ring is cut in two halves; the tensor is contracted with one half once for all cores of the other,
    which takes 2·numel·R² multiply-adds a sweep however many modes there are.
    """
    total = squared_norm(tensor)
    cut = middle_cut(tensor.shape)
    halves = [list(start[:cut]), list(start[cut:])]
    matrix = tensor.reshape(math.prod(tensor.shape[:cut]), -1)
    errors: list[float] = []
    for _ in range(sweeps):
        for side in (0, 1):
            inner = halves[side]
            half = _Half(
                matrix if side == 0 else matrix.T, halves[1 - side], inner[0].shape[0], inner[-1].shape[2]
            )
            for index in range(len(inner)):
                _update(index, inner, half, ridge)
        errors.append(math.sqrt(chain_residual(tensor, halves[0] + halves[1]) / total) if total else 0.0)
        if errors[-1] <= tol or (len(errors) > 1 and abs(errors[-2] - errors[-1]) < tol):
            break
    return RingFit(halves[0] + halves[1], errors)


def best_start64(
    tensor: Tensor,
    fixed: Sequence[Sequence[Tensor]],
    random: Sequence[Sequence[Tensor]],
    *,
    ridge: float,
    sweeps: int,
    tol: float,
) -> RingFit:
    """ALS from several starts, of which only the best after a trial goes on.

    `random` starts begin under a ridge that falls from sweep to sweep, which keeps the cores from settling
    early into one another's mistakes; `fixed` ones, good from the beginning, do without. All count against
    `sweeps`; the errors returned are those of the sweeps that follow at `ridge`.
    """
    fits: list[tuple[RingFit, int]] = []
    for start, falling in [(s, False) for s in fixed] + [(s, True) for s in random]:
        cores = list(start)
        # A short run keeps the end of the sequence, and half of its sweeps.
        ridges = (
            FALLING_RIDGES[len(FALLING_RIDGES) - min(len(FALLING_RIDGES), sweeps // 2) :] if falling else ()
        )
        for early in ridges:
            cores = ring_als64(tensor, cores, ridge=max(ridge, early), sweeps=1, tol=0.0).cores
        left = sweeps - len(ridges)
        trial = left if len(fixed) + len(random) == 1 else min(left, TRIAL_SWEEPS)
        fits.append((ring_als64(tensor, cores, ridge=ridge, sweeps=trial, tol=tol), left - trial))
    kept, left = min(fits, key=lambda pair: pair[0].relative_errors[-1])
    errors = kept.relative_errors
    if left == 0 or errors[-1] <= tol or (len(errors) > 1 and abs(errors[-2] - errors[-1]) < tol):
        return kept
    rest = ring_als64(tensor, kept.cores, ridge=ridge, sweeps=left, tol=tol)
    return RingFit(rest.cores, errors + rest.relative_errors)
