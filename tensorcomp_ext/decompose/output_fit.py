"""Errors and factors of every rank of a layer at once, in the norm of the patches that it reads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .unfolding import DecompositionError, check_tensor

RIDGE = 1e-6


class OutputFit(ABC):
    """A weight A whose approximations L are judged by ‖(A − L) P^½‖/‖A P^½‖, P = E[x xᵀ] of what it reads.

    That is the relative error of the outputs over the inputs of which P is the second moment; without P it is
    that of the weights. Computed in float64 on the CPU.
    """

    @abstractmethod
    def squared_error(self, ranks: Sequence[int]) -> float:
        """The squared relative error of `factors` of these ranks."""

    @abstractmethod
    def factors(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        """The factors of these ranks in the order of the format, in the dtype and device of the weight."""


def _weight(weight: Tensor, name: str, min_ndim: int, max_ndim: int) -> Tensor:
    return (
        check_tensor(weight.detach(), f"{name}: weight", min_ndim=min_ndim, max_ndim=max_ndim).cpu().double()
    )


def _moment(gram: Tensor | None, size: int, name: str) -> Tensor | None:
    """P scaled to a mean of 1 on its diagonal, with a ridge for directions the data never showed."""
    if gram is None:
        return None
    found = check_tensor(gram, f"{name}: gram", min_ndim=2, max_ndim=2).cpu().double()
    if tuple(found.shape) != (size, size):
        raise ValueError(f"{name}: gram must be [{size}, {size}], got {list(found.shape)}")
    mean = float(found.trace()) / size
    if mean <= 0.0:
        return None  # the layer reads zeros only: its weights are all there is to judge by
    return (found + found.T) / (2 * mean) + RIDGE * torch.eye(size, dtype=torch.float64)


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors of a symmetric matrix, the largest first."""
    try:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"eigh did not converge: {error}") from error
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def _left_over(values: Tensor, total: float, rank: int) -> float:
    if total <= 0.0:
        return 0.0
    return min(1.0, max(0.0, 1.0 - float(values[:rank].sum()) / total))


class MatrixFit(OutputFit):
    """The best matrices L of rank R for a linear layer A [out, in]: L = U Uᵀ A, U leading of A P Aᵀ.

    Args:
        weight: A; gram: P [in, in] up to a factor, or None for the identity.

    Costs in²·out + out³ multiply-adds once. Raises ValueError for NaN, Inf or sizes that do not fit.
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None) -> None:
        self.weight = weight
        self.matrix = _weight(weight, "MatrixFit", 2, 2)
        moment = _moment(gram, self.matrix.shape[1], "MatrixFit")
        seen = self.matrix if moment is None else self.matrix @ moment
        self.values, self.vectors = _descending(seen @ self.matrix.T)
        self.total = float(self.values.sum())

    def squared_error(self, ranks: Sequence[int]) -> float:
        return _left_over(self.values, self.total, ranks[0])

    def factors(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        left = self.vectors[:, : ranks[0]]
        return _cast(self.weight, left, left.T @ self.matrix)


class KernelFit(OutputFit):
    """Tucker-2 forms of a kernel A [T, S, *k] over the patches [S·K] that it reads.

    The input factor V spans the leading directions of A whitened by the covariance C of the channels,
    V = C^-½ U with U those of unfold_S(A ×_S C^½). Given V, core and output factor are the best there are
    (reduced-rank regression): with Q = V ⊗ I_K, L Lᵀ = Qᵀ P Q and Y = A P Q L^-ᵀ, the output factor holds
    the leading left singular vectors of Y and the core is its part of Y L^-1. The squared error is what the
    smaller singular values of Y hold and what Q misses, exactly. Without P this is the sequentially truncated
    HOSVD (Vannieuwenhoven, Vandebril and Meerbergen, 2012).

    Args:
        weight: A, one to three spatial dimensions; gram: P [S·K, S·K] of patches in the order of
            `A.flatten(1)`, up to a factor, or None for the identity.

    Costs 2 (S·K)²·S + (S·K)³/3 multiply-adds, without P S²·T·K, and T²·R_in·K for every R_in that is asked
    for. Raises ValueError for NaN, Inf or sizes that do not fit, DecompositionError where no driver
    converges.
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None) -> None:
        self.weight = weight
        kernel = _weight(weight, "KernelFit", 3, 5)
        self.kernel = kernel.flatten(2)  # [T, S, K]
        ins, taps = self.kernel.shape[1:]
        moment = _moment(gram, ins * taps, "KernelFit")
        flat = self.kernel.flatten(1)
        seen = flat if moment is None else flat @ moment  # A P
        self.total = float((seen * flat).sum())
        whitened, inverse = self.kernel, None
        if moment is not None:
            channels = torch.einsum("akbk->ab", moment.reshape(ins, taps, ins, taps))
            values, vectors = _descending(channels)
            roots = values.clamp_min(1e-12 * float(values[0])).sqrt()
            whitened = torch.einsum("tsk,sr->trk", self.kernel, (vectors * roots) @ vectors.T)
            inverse = (vectors / roots) @ vectors.T
        unfolded = whitened.transpose(0, 1).flatten(1)
        _, leading = _descending(unfolded @ unfolded.T)
        # Columns orthogonalised in order span the same for every number of them, and lose no precision.
        self.basis = leading if inverse is None else torch.linalg.qr(inverse @ leading)[0]
        self.lower: Tensor | None = None
        if moment is None:
            self.seen = torch.einsum("tsk,sr->trk", self.kernel, self.basis).flatten(1)
        else:
            self.seen, self.lower = self._whitened(seen, moment)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def _whitened(self, seen: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Y and L of the whole basis, ordered by (input rank, tap): those of R_in are their leading parts."""
        outs, ins, taps = self.kernel.shape
        inner = torch.einsum("tsk,sr->trk", seen.reshape(outs, ins, taps), self.basis).flatten(1)
        half = torch.einsum("psk,sr->prk", moment.reshape(-1, ins, taps), self.basis).flatten(1)
        square = torch.einsum("skq,sr->rkq", half.reshape(ins, taps, -1), self.basis).flatten(0, 1)
        square = (square + square.T) / 2
        ridge = 0.0
        for _ in range(5):
            square.diagonal().add_(ridge)
            lower, failed = torch.linalg.cholesky_ex(square)
            if not int(failed):
                return torch.linalg.solve_triangular(lower, inner.T, upper=False).T, lower
            ridge = max(10 * ridge, RIDGE)  # moments summed in lower precision may be a little indefinite
        raise DecompositionError("KernelFit: the second moment of the patches is not positive definite")

    def _spectrum(self, rank_in: int) -> tuple[Tensor, Tensor]:
        if rank_in not in self._known:
            seen = self.seen[:, : rank_in * self.kernel.shape[2]]
            self._known[rank_in] = _descending(seen @ seen.T)
        return self._known[rank_in]

    def squared_error(self, ranks: Sequence[int]) -> float:
        """Of (R_out, R_in)."""
        return _left_over(self._spectrum(ranks[1])[0], self.total, ranks[0])

    def factors(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        """(core [R_out, R_in, *k], factor_out [T, R_out], factor_in [S, R_in])."""
        rank_out, rank_in = ranks
        size = rank_in * self.kernel.shape[2]
        seen, lower = self.seen[:, :size], self.lower
        left = self._spectrum(rank_in)[1][:, :rank_out]
        core = left.T @ seen
        if lower is not None:
            core = torch.linalg.solve_triangular(lower[:size, :size], core, upper=False, left=False)
        shape = (rank_out, rank_in, *self.weight.shape[2:])
        return _cast(self.weight, core.reshape(shape), left, self.basis[:, :rank_in])


def _cast(like: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.to(like.device, like.dtype).contiguous() for part in parts)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """√(tr (A − L) P (A − L)ᵀ / tr A P Aᵀ), both weights [out, …] flattened; 0.0 where both are zero."""
    exact = weight.detach().cpu().double().flatten(1)
    wrong = exact - approximation.detach().cpu().double().flatten(1)
    moment = gram.cpu().double()
    scale = float(((exact @ moment) * exact).sum())
    missed = max(0.0, float(((wrong @ moment) * wrong).sum()))
    return math.sqrt(missed / scale) if scale > 0.0 else (0.0 if missed == 0.0 else math.inf)
