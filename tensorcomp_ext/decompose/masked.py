"""Low-rank fits of the observed entries of a tensor, the others being free."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .chain_ranks import train_ranks
from .cp import cp_start, cp_sweep, khatri_rao, largest_cp_rank
from .ring_als import ring_als64
from .svd import leading_factor, truncated_svd64
from .tensor_train import chain_product, check_matrix, interleave, split_modes, sweep
from .tucker import project_all
from .tucker_all import tucker_ranks
from .unfolding import check_rank, check_tensor, expand, project

# Entries of the table of products of Khatri-Rao columns up to which CP solves every row exactly.
ROW_TABLE = 1 << 26
ROW_RIDGE = 1e-12
# Below this share of ‖W ⊙ A‖ the objective is rounding.
EXACT = 2e-15

Ranks = SupportsIndex | Sequence[SupportsIndex]


class MaskedFit(NamedTuple):
    """The fit that left the least: factors in the order of the format, float64 history of its search.

    objective[k] = ‖W ⊙ (A − L_k)‖ after iteration k; relative_error is the least of them over ‖W ⊙ A‖, of the
    float64 factors before the cast.
    """

    factors: tuple[Tensor, ...]
    objective: list[float]
    relative_error: float


class Solver(ABC):
    """One iteration at a time of a fit to a completed tensor, begun where the last one ended."""

    dense: Tensor

    @abstractmethod
    def improve(self, completed: Tensor) -> Tensor:
        """Improve on the fit of `completed` and return its dense form."""

    def fit(self, completed: Tensor) -> Tensor:
        """`improve`, its result kept as `dense`."""
        self.dense = self.improve(completed)
        return self.dense

    @abstractmethod
    def begin(self, factors: Sequence[Tensor], dense: Tensor) -> None:
        """Go on from these factors, whose dense form is given."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The factors of the last fit, float64."""

    def observed(self, tensor: Tensor, mask: Tensor) -> Tensor | None:
        """A step on the observed entries alone, where the format has one better than imputation."""
        return None


class SVDSolver(Solver):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def begin(self, factors: Sequence[Tensor], dense: Tensor) -> None:
        self.a, self.b = factors
        self.dense = dense

    def improve(self, completed: Tensor) -> Tensor:
        u, s, vh = truncated_svd64(completed, self.rank)
        self.a, self.b = u * s, vh
        return self.a @ self.b

    def factors(self) -> tuple[Tensor, ...]:
        return self.a, self.b


class TuckerSolver(Solver):
    """A sweep of HOOI from the factors of before: the error of the completed tensor cannot rise."""

    def __init__(self, ranks: dict[int, int]) -> None:
        self.ranks = ranks
        self.found: dict[int, Tensor] = {}

    def begin(self, factors: Sequence[Tensor], dense: Tensor) -> None:
        # Only the spans matter: the core is solved for anew.
        self.core = factors[0]
        bases = zip(self.ranks, factors[1:], strict=True)
        self.found = {mode: torch.linalg.qr(factor)[0] for mode, factor in bases}
        self.dense = dense

    def improve(self, completed: Tensor) -> Tensor:
        if not self.found:
            self.found = {m: leading_factor(completed, m, rank) for m, rank in self.ranks.items()}
        reduced = completed
        for mode, rank in self.ranks.items():
            reduced = project_all(completed, self.found, skip=mode)
            self.found[mode] = leading_factor(reduced, mode, rank)
        last = list(self.ranks)[-1]
        self.core = dense = project(reduced, last, self.found[last])
        for mode, factor in self.found.items():
            dense = expand(dense, mode, factor)
        return dense

    def factors(self) -> tuple[Tensor, ...]:
        return self.core, *(self.found[mode] for mode in sorted(self.found))


class TrainSolver(Solver):
    """TT-SVD; a sweep of least squares from the cores of before where that would raise the objective."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self.cores: list[Tensor] = []

    def begin(self, factors: Sequence[Tensor], dense: Tensor) -> None:
        self.cores, self.dense = list(factors), dense

    def improve(self, completed: Tensor) -> Tensor:
        cores = sweep(completed, completed.shape, self.ranks)
        dense = chain_product(cores).reshape(completed.shape)
        if self.cores and (completed - dense).norm() > (completed - self.dense).norm():
            cores = ring_als64(completed, self.cores, ridge=0.0, sweeps=1, tol=0.0).cores
            dense = chain_product(cores).reshape(completed.shape)
        self.cores = cores
        return dense

    def factors(self) -> tuple[Tensor, ...]:
        return tuple(self.cores)


class CPSolver(Solver):
    """Every row of every factor solved on its observed entries; a sweep of ALS where that is too large."""

    def __init__(self, rank: int, tensor: Tensor) -> None:
        self.found = cp_start(tensor, rank)
        self.rows = tensor.numel() // min(tensor.shape) * rank * rank <= ROW_TABLE

    def begin(self, factors: Sequence[Tensor], dense: Tensor) -> None:
        self.found, self.dense = list(factors), dense

    def improve(self, completed: Tensor) -> Tensor:
        self.found = cp_sweep(completed, self.found)
        return self._dense(completed.shape)

    def observed(self, tensor: Tensor, mask: Tensor) -> Tensor | None:
        if not self.rows:
            return None
        for mode in range(tensor.ndim):
            others = [f for other, f in enumerate(self.found) if other != mode]
            table = khatri_rao(others)  # [rest, R]
            rank = table.shape[1]
            seen = mask.movedim(mode, 0).reshape(mask.shape[mode], -1).double()
            values = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
            grams = (seen @ (table[:, :, None] * table[:, None, :]).reshape(-1, rank * rank)).reshape(
                -1, rank, rank
            )
            right = (seen * values) @ table
            scale = grams.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            shift = (ROW_RIDGE * scale)[:, None, None] * torch.eye(rank, dtype=torch.float64)
            # The ridge pulls towards the row of before, so that no step can raise the objective.
            old = self.found[mode]
            residual = right - (grams @ old[:, :, None])[:, :, 0]
            step = torch.linalg.lstsq(grams + shift, residual[:, :, None], driver="gelsd").solution[:, :, 0]
            self.found[mode] = old + step
        norms = torch.stack([factor.norm(dim=0) for factor in self.found])
        mean = norms.clamp_min(1e-300).log().mean(dim=0).exp()
        self.found = [f * (mean / norm.clamp_min(1e-300)) for f, norm in zip(self.found, norms, strict=True)]
        return self._dense(tensor.shape)

    def _dense(self, shape: Sequence[int]) -> Tensor:
        return (self.found[0] @ khatri_rao(self.found[1:]).T).reshape(tuple(shape))

    def factors(self) -> tuple[Tensor, ...]:
        return tuple(self.found)


def make_solver(tensor: Tensor, format: str, rank: Ranks) -> Solver:
    name = "masked_fit: rank"
    if format in ("svd", "cp"):
        if isinstance(rank, (tuple, list)):
            if len(rank) != 1:
                raise ValueError(f"{name} must be one int for {format}, got {tuple(rank)}")
            rank = rank[0]
        if format == "svd":
            if tensor.ndim != 2:
                raise ValueError(f"masked_fit: svd needs a matrix, got shape {list(tensor.shape)}")
            return SVDSolver(check_rank(rank, min(tensor.shape), name))  # type: ignore[arg-type]
        largest = largest_cp_rank(tensor.shape)
        return CPSolver(check_rank(rank, largest, name), tensor)  # type: ignore[arg-type]
    if format == "tucker":
        return TuckerSolver(dict(enumerate(tucker_ranks(tensor.shape, rank, name))))
    if format == "tucker2":
        if not 3 <= tensor.ndim <= 5:
            raise ValueError(f"masked_fit: tucker2 needs a kernel [T, S, *k], got shape {list(tensor.shape)}")
        return TuckerSolver(dict(enumerate(tucker_ranks(tensor.shape[:2], rank, name))))
    return TrainSolver(train_ranks(tensor.shape, rank, name))


_FORMATS = ("cp", "svd", "tt", "ttm", "tucker", "tucker2")


def masked_fit(
    tensor: Tensor,
    mask: Tensor,
    format: str,
    rank: Ranks,
    *,
    iterations: int = 1500,
    tol: float = 1e-7,
    out_modes: Sequence[SupportsIndex] | None = None,
    in_modes: Sequence[SupportsIndex] | None = None,
) -> MaskedFit:
    """Factors of L that minimise ‖W ⊙ (A − L)‖: entries where the mask is False count for nothing.

    Imputation: from L = 0, X = W⊙A + (1−W)⊙L and L ← a fit of X: an SVD ("svd"), a TT-SVD ("tt", "ttm"), or
    a sweep of HOOI from the factors of before ("tucker", "tucker2"). Where TT-SVD, which is not the best
    train, would raise the objective, a sweep of least squares from the cores of before takes its place.
    Unobserved entries are extrapolated from the last two fits (ours: Nesterov's momentum; one that would
    raise the objective is taken back, and the momentum begins anew). CP solves for every row of every factor
    on its observed entries exactly where numel/min(I)·R² ≤ 2²⁶, else it imputes with a sweep of ALS. None of
    these steps raises the objective but by rounding; the best fit is kept.

    Args:
        tensor: A, a matrix for "svd" and "ttm", a kernel [T, S, *k] for "tucker2"
        mask: bool of the same shape, True where A is observed
        rank: as the decomposition of that format takes it
        iterations, tol: stop after so many, or when the objective changes by less than tol of itself
        out_modes, in_modes: of "ttm"

    Factors: svd (a, b), tucker (core, *factors), tucker2 (core, factor_out, factor_in), cp factors, tt and
    ttm cores. Computed in float64, cast to the dtype and device of `tensor`. An iteration costs one
    decomposition, or two where an extrapolation is taken back.

    Raises:
        ValueError: NaN, Inf, wrong shapes, ranks, modes or format, a mask without a True entry.
        TypeError: a mask that is not bool.
        DecompositionError: no driver converges.
    """
    if format not in _FORMATS:
        raise ValueError(f"masked_fit: format must be one of {', '.join(_FORMATS)}, got {format!r}")
    if iterations < 1:
        raise ValueError(f"masked_fit: iterations must be at least 1, got {iterations}")
    if not 0.0 <= tol < math.inf:
        raise ValueError(f"masked_fit: tol must be finite and not negative, got {tol}")
    checked = check_tensor(tensor, "masked_fit: tensor", min_ndim=2)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"masked_fit: mask must be a bool tensor, got {got}")
    if mask.shape != checked.shape:
        raise ValueError(f"masked_fit: mask must be {list(checked.shape)}, got {list(mask.shape)}")
    seen = mask.detach().to("cpu")
    if not bool(seen.any()):
        raise ValueError("masked_fit: mask leaves no entry to fit")
    outs: tuple[int, ...] = ()
    ins: tuple[int, ...] = ()
    if format == "ttm":
        if out_modes is None or in_modes is None:
            raise ValueError("masked_fit: ttm needs out_modes and in_modes")
        checked, outs, ins = check_matrix("masked_fit", checked, out_modes, in_modes)
        checked, seen = interleave(checked, outs, ins), interleave(seen, outs, ins)
    elif out_modes is not None or in_modes is not None:
        raise ValueError(f"masked_fit: out_modes and in_modes are for ttm, got them for {format}")
    target = checked.double().contiguous()
    best, history, error = _iterate(target, seen, make_solver(target * seen, format, rank), iterations, tol)
    if format == "ttm":
        return MaskedFit(split_modes(best, outs, ins, tensor), history, error)
    return MaskedFit(tuple(f.to(tensor.device, tensor.dtype).contiguous() for f in best), history, error)


def _iterate(
    target: Tensor, seen: Tensor, solver: Solver, iterations: int, tol: float
) -> tuple[tuple[Tensor, ...], list[float], float]:
    total = float((target * seen).norm())
    dense = before = torch.zeros_like(target)
    history: list[float] = []
    best: tuple[Tensor, ...] = ()
    momentum = 1.0

    def left(found: Tensor) -> float:
        return float(((target - found) * seen).norm())

    for _ in range(iterations):
        found = solver.observed(target, seen)
        if found is None:
            kept, earlier = solver.factors() if history else (), momentum
            momentum = (1.0 + math.sqrt(1.0 + 4.0 * earlier**2)) / 2.0
            step = (earlier - 1.0) / momentum
            found = solver.fit(torch.where(seen, target, dense + step * (dense - before)))
            if step and not left(found) <= history[-1]:
                # The extrapolation went too far: back to the fit of before, and from rest again.
                solver.begin(kept, dense)
                momentum = 1.0
                found = solver.fit(torch.where(seen, target, dense))
        before, dense = dense, found
        history.append(left(dense))
        if history[-1] <= min(history):
            best = tuple(factor.clone() for factor in solver.factors())
        if history[-1] <= EXACT * total:
            break
        if len(history) > 1 and abs(history[-2] - history[-1]) < tol * history[-2]:
            break
    return best, history, min(history) / total if total else 0.0
