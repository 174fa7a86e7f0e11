"""Least squares from normal equations, with a way out where they are too ill-conditioned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from .unfolding import DecompositionError

# Normal equations whose Cholesky diagonal spans more than this are solved another way: the condition number
# of the least-squares problem is then at least its value, that of the equations at least its square.
DIAGONAL_SPAN = 1e6
# Rows · columns² of a design matrix up to which it is formed and factorised (a second or so on two cores).
DESIGN_WORK = 1 << 34
# Eigenvalues of a Gram matrix below this share of the largest are taken for zero.
NEGLIGIBLE = 1e-14


def _cholesky(gram: Tensor, rhs: Tensor) -> Tensor | None:
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if int(info) != 0 or float(diagonal.max()) > DIAGONAL_SPAN * float(diagonal.min()):
        return None
    return torch.cholesky_solve(rhs.T, factor).T


def _design(matrix: Tensor, targets: Tensor) -> Tensor | None:
    """Minimum-norm least squares by QR with column pivoting, None where LAPACK gives no finite answer."""
    try:
        found = scipy.linalg.lstsq(
            matrix.numpy(), targets.numpy(), lapack_driver="gelsy", cond=1e-13, check_finite=False
        )[0]
    except (np.linalg.LinAlgError, ValueError):
        return None
    result = torch.from_numpy(np.ascontiguousarray(found)).T
    return result if bool(torch.isfinite(result).all()) else None


def _pseudo_inverse(gram: Tensor, rhs: Tensor) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"eigh of {gram.shape[0]} x {gram.shape[0]} normal equations did not converge: {error}"
        ) from error
    kept = values > NEGLIGIBLE * float(values[-1])
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
    return (rhs @ vectors * inverse) @ vectors.T


def solve_normal(
    gram: Tensor,
    rhs: Tensor,
    design: Callable[[], tuple[Tensor, Tensor]] | None = None,
    design_work: int = 0,
) -> Tensor:
    """X [n, q] minimising ‖A − X Sᵀ‖ from the Gram matrix SᵀS [q, q] and A S [n, q], in float64.

    Cholesky first. Where that breaks down or its diagonal spans more than 1e6, `design` (giving S [rows, q]
    and Aᵀ [rows, n]) is factorised by pivoted QR if it is given and `design_work` (rows·q²) is within
    reach; else eigenvalues of the Gram matrix below 1e-14 of the largest are dropped. DecompositionError
    when that fails too.
    """
    solution = _cholesky(gram, rhs)
    if solution is not None:
        return solution
    if design is not None and design_work <= DESIGN_WORK:
        solution = _design(*design())
        if solution is not None:
            return solution
    return _pseudo_inverse(gram, rhs)
