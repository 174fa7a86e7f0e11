"""Low-rank fits in the norm of a layer's inputs: the error of the outputs rather than of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .chain_ranks import check_modes
from .masked import Ranks, Solver, make_solver
from .tensor_train import check_matrix, interleave, split_modes
from .unfolding import DecompositionError, check_tensor

FORMATS = ("cp", "svd", "tt", "ttm", "tucker", "tucker2")
# A whitened covariance this close to a multiple of the identity leaves nothing to iterate on.
WHITE = 1e-9


class WeightedFit(NamedTuple):
    """The fit of least weighted error: factors in the order of `masked_fit`.

    relative_error = ‖(A − L) C^½‖/‖A C^½‖; unweighted_start is that of the fit that knows nothing of C.
    Both of the float64 factors, before the cast.
    """

    factors: tuple[Tensor, ...]
    relative_error: float
    unweighted_start: float


class _Layout:
    """Where the input modes of a tensor are, and which factor each of them belongs to."""

    def __init__(self, format: str, shape: Sequence[int], modes: Sequence[int], outs: Sequence[int]) -> None:
        self.format, self.shape, self.modes, self.outs = format, tuple(shape), tuple(modes), tuple(outs)
        if format == "ttm":
            self.sizes = tuple(n // o for n, o in zip(shape, outs, strict=True))
        else:
            self.sizes = tuple(shape[mode] for mode in modes)
        self.inputs = math.prod(self.sizes)

    def matrix(self, tensor: Tensor) -> Tensor:
        """[everything else, inputs]."""
        if self.format != "ttm":
            ends = range(tensor.ndim - len(self.modes), tensor.ndim)
            return tensor.movedim(self.modes, tuple(ends)).reshape(-1, self.inputs)
        count = len(self.sizes)
        split = tensor.reshape([n for pair in zip(self.outs, self.sizes, strict=True) for n in pair])
        return split.permute(*range(0, 2 * count, 2), *range(1, 2 * count, 2)).reshape(-1, self.inputs)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.format == "ttm":
            return interleave(matrix, self.outs, self.sizes)
        rest = [size for mode, size in enumerate(self.shape) if mode not in self.modes]
        ends = tuple(range(len(rest), len(self.shape)))
        return matrix.reshape(*rest, *self.sizes).movedim(ends, self.modes).contiguous()

    def transform(self, factors: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        """The factors with every input mode k multiplied by maps[k]."""
        found = list(factors)
        for k, matrix in enumerate(maps):
            if self.format == "ttm":
                core = found[k].reshape(found[k].shape[0], self.outs[k], self.sizes[k], -1)
                found[k] = torch.einsum("ij,aojb->aoib", matrix, core).reshape(found[k].shape)
                continue
            mode = self.modes[k]
            if self.format == "tt":
                found[mode] = torch.einsum("ij,ajb->aib", matrix, found[mode])
            elif self.format == "svd":
                found[mode] = found[mode] @ matrix if mode == 1 else matrix @ found[mode]
            else:
                place = mode if self.format == "cp" else mode + 1  # the core comes first
                found[place] = matrix @ found[place]
        return found


def _covariance(covariance: Tensor, size: int, ridge: float) -> Tensor:
    checked = check_tensor(covariance, "weighted_fit: covariance", min_ndim=2, max_ndim=2).double()
    if tuple(checked.shape) != (size, size):
        raise ValueError(f"weighted_fit: covariance must be [{size}, {size}], got {list(checked.shape)}")
    symmetric = (checked + checked.T) / 2
    if float((checked - symmetric).abs().max()) > 1e-4 * float(checked.abs().max()):
        raise ValueError("weighted_fit: covariance must be symmetric")
    mean = float(symmetric.trace()) / size
    if mean <= 0.0:
        raise ValueError("weighted_fit: covariance must be positive semidefinite and not zero")
    return symmetric / mean + ridge * torch.eye(size, dtype=torch.float64)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive definite matrix and its inverse."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"eigh of the covariance did not converge: {error}") from error
    if float(values[0]) <= 0.0:
        raise ValueError(
            f"weighted_fit: covariance has the eigenvalue {float(values[0]):.3g} of its mean; raise ridge"
        )
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _marginals(covariance: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The covariance of every mode alone, averaged over the others."""
    found = []
    for k, size in enumerate(sizes):
        before, after = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
        split = covariance.reshape(before, size, after, before, size, after)
        found.append(torch.einsum("aibajb->ij", split) / (before * after))
    return found


def _apply(matrix: Tensor, maps: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The rows of [rows, Π sizes] with every mode multiplied by its map."""
    result = matrix.reshape(-1, *sizes)
    for k, part in enumerate(maps):
        result = torch.tensordot(result, part, dims=([k + 1], [1])).movedim(-1, k + 1)
    return result.reshape(matrix.shape)


def _solve(
    tensor: Tensor, layout: _Layout, covariance: Tensor, rank: Ranks, iterations: int, tol: float
) -> tuple[list[Tensor], float, float]:
    identity = len(layout.sizes) == 1
    roots, inverses = zip(*map(_roots, _marginals(covariance, layout.sizes)), strict=True)
    target = layout.matrix(tensor)
    half = _roots(covariance)[0] if not identity else roots[0]
    scale = float((target @ half).norm())
    if scale == 0.0:
        scale = 1.0

    def error(dense: Tensor) -> float:
        """Of a dense form in the whitened modes."""
        return float(((target - _apply(layout.matrix(dense), inverses, layout.sizes)) @ half).norm()) / scale

    plain = make_solver(tensor, layout.format, rank)
    _settle(plain, tensor, iterations, tol)
    carried = layout.transform(plain.factors(), roots)
    whitened = layout.tensor(_apply(target, roots, layout.sizes))
    start = layout.tensor(_apply(layout.matrix(plain.dense), roots, layout.sizes))
    unweighted = error(start)

    solver = make_solver(whitened, layout.format, rank)
    _settle(solver, whitened, iterations, tol)
    dense, best, least = solver.dense, solver.factors(), error(solver.dense)
    if unweighted < least:
        solver.begin(carried, start)
        dense, best, least = start, tuple(carried), unweighted
    if not identity:
        rest = _apply(_apply(covariance, inverses, layout.sizes).T, inverses, layout.sizes)
        values = torch.linalg.eigvalsh((rest + rest.T) / 2)
        if float(values[-1] - values[0]) > WHITE * float(values[-1]):
            # ‖(B − L) R^½‖² with R ≤ λI is majorised at L by λ‖L' − (L + (B − L) R/λ)‖² + const, so an
            # improved unweighted fit of that tensor improves the weighted one.
            weights, previous = rest / float(values[-1]), least
            for _ in range(iterations):
                step = layout.matrix(whitened - dense) @ weights
                dense = solver.fit(dense + layout.tensor(step))
                now = error(dense)
                if now < least:
                    best, least = tuple(f.clone() for f in solver.factors()), now
                if abs(previous - now) < tol * previous:
                    break
                previous = now
    return layout.transform(best, inverses), least, unweighted


def _settle(solver: Solver, tensor: Tensor, iterations: int, tol: float) -> None:
    """Fit until the error changes by less than `tol` of itself."""
    previous = math.inf
    for _ in range(iterations):
        now = float((tensor - solver.fit(tensor)).norm())
        if previous - now <= tol * now:
            break
        previous = now


def weighted_fit(
    tensor: Tensor,
    covariance: Tensor,
    format: str,
    rank: Ranks,
    *,
    modes: Sequence[int] | None = None,
    out_modes: Sequence[SupportsIndex] | None = None,
    in_modes: Sequence[SupportsIndex] | None = None,
    ridge: float = 1e-8,
    iterations: int = 200,
    tol: float = 1e-6,
) -> WeightedFit:
    """Factors of L that minimise ‖(A − L) C^½‖, C the covariance of what the layer reads.

    With one input mode the fit is that of A C^½ with C^-½ carried into the factor of that mode: the best
    there is for "svd", where L = A C^½ truncated times C^-½. With several, every mode is whitened by its
    own covariance, which all formats here can carry; what is left of C is met by majorisation, each step an
    improved fit of L + (A − L) C/λ. The fit never has a larger weighted error than the unweighted one, from
    which it starts if that is better. An iteration costs numel·I multiply-adds and one decomposition.

    Args:
        tensor: A, a matrix [out, in] for "svd" and "ttm", a kernel [T, S, *k] for "tucker2"
        covariance: [I, I], I the product of the input modes: E[x xᵀ] up to a factor; symmetric, may be
            singular
        modes: the input modes of the tensor in the order in which they index C, row-major; (1,) for "svd"
            and "tucker2", those of in_modes for "ttm"
        ridge: added to C, relative to the mean of its diagonal: directions the data never showed count this
            much
        iterations, tol: stop after so many, or when the error changes by less than tol of itself

    Factors as those of `masked_fit`. Computed in float64, cast to the dtype and device of `tensor`. Raises
    ValueError for NaN, Inf, wrong shapes, ranks, modes, format, or a covariance that is not positive
    semidefinite; DecompositionError when no driver converges.
    """
    if format not in FORMATS:
        raise ValueError(f"weighted_fit: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if iterations < 1:
        raise ValueError(f"weighted_fit: iterations must be at least 1, got {iterations}")
    for name, number in (("ridge", ridge), ("tol", tol)):
        if not 0.0 <= number < math.inf:
            raise ValueError(f"weighted_fit: {name} must be finite and not negative, got {number}")
    checked = check_tensor(tensor, "weighted_fit: tensor", min_ndim=2)
    outs: tuple[int, ...] = ()
    if format == "ttm":
        if out_modes is None or in_modes is None:
            raise ValueError("weighted_fit: ttm needs out_modes and in_modes")
        checked, outs, ins = check_matrix("weighted_fit", checked, out_modes, in_modes)
        check_modes("weighted_fit", "in_modes", ins, checked.shape[1])
        checked = interleave(checked, outs, ins)
        chosen: tuple[int, ...] = tuple(range(len(ins)))
    else:
        chosen = _input_modes(format, checked.ndim, modes)
    layout = _Layout(format, checked.shape, chosen, outs)
    weights = _covariance(covariance, layout.inputs, ridge)
    found, error, unweighted = _solve(checked.double().contiguous(), layout, weights, rank, iterations, tol)
    if format == "ttm":
        return WeightedFit(split_modes(found, outs, layout.sizes, tensor), error, unweighted)
    parts = tuple(part.to(tensor.device, tensor.dtype).contiguous() for part in found)
    return WeightedFit(parts, error, unweighted)


def _input_modes(format: str, ndim: int, modes: Sequence[int] | None) -> tuple[int, ...]:
    if modes is None:
        if format not in ("svd", "tucker2") and ndim != 2:
            raise ValueError(f"weighted_fit: {format} needs modes, the input modes of the tensor")
        return (1,)
    chosen = tuple(mode % ndim if -ndim <= mode < ndim else -1 for mode in modes)
    if not chosen or -1 in chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"weighted_fit: modes must be different modes of {ndim}, got {list(modes)}")
    if format == "tucker2" and not set(chosen) <= {0, 1}:
        raise ValueError(
            f"weighted_fit: the input mode of tucker2 must be one of its channels, got {list(modes)}"
        )
    return chosen
