"""Singular values and truncated SVD, with a ladder of drivers and a Gram-matrix route for large matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from .blas_threads import ONE_THREAD_SIZE, blas_threads
from .unfolding import (
    DecompositionError,
    check_rank,
    check_tensor,
    gram,
    project,
    unfold,
)

# m·n·min(m, n) up to which a full thin SVD takes about a tenth of a second on one core.
DENSE_SVD_WORK = 1 << 27
# ‖A‖² − ‖core‖² has an error of about 1e-16‖A‖²: below this share of ‖A‖² the residual itself is formed.
CANCELLATION = 1e-8


class TruncatedSVD(NamedTuple):
    """`A ≈ U diag(S) Vh`: left [m, r], values [r] descending, right [r, n]."""

    U: Tensor
    S: Tensor
    Vh: Tensor


_Triple = tuple[Tensor, Tensor, Tensor]


def _gesdd(matrix: Tensor) -> _Triple:
    if min(matrix.shape) <= ONE_THREAD_SIZE:  # torch's library waits for its threads as OpenBLAS does
        return _scipy_svd(matrix, "gesdd")
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _gesvd(matrix: Tensor) -> _Triple:
    # Divide and conquer can fail where the older QR iteration converges.
    return _scipy_svd(matrix, "gesvd")


def _scipy_svd(matrix: Tensor, driver: str) -> _Triple:
    with blas_threads(min(matrix.shape)):
        u, s, vh = scipy.linalg.svd(
            matrix.numpy(), full_matrices=False, lapack_driver=driver, check_finite=False
        )
    return torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vh)


def _gram_eigh(matrix: Tensor) -> _Triple:
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _gram_eigh(matrix.T.contiguous())
        return vh.T.contiguous(), s, u.T.contiguous()
    u = leading_eigenvectors(lambda: gram(matrix, 0), matrix.shape[0])
    # The rows of Uᵀ A are orthogonal but for rounding, so the triangle is diagonal: its entries are ± the
    # values.
    q, triangle = torch.linalg.qr((u.T @ matrix).T)
    signed = triangle.diagonal()
    s, order = signed.abs().sort(descending=True)
    return u[:, order], s, (q * signed.sign())[:, order].T.contiguous()


_SVD_DRIVERS: tuple[Callable[[Tensor], _Triple], ...] = (_gesdd, _gesvd, _gram_eigh)


def thin_svd(matrix: Tensor) -> _Triple:
    """Thin SVD of a float64 matrix by the first driver that converges; DecompositionError when none does."""
    reasons = []
    for driver in _SVD_DRIVERS:
        try:
            u, s, vh = driver(matrix)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError, DecompositionError) as error:
            reasons.append(f"{driver.__name__.strip('_')}: {error}")
            continue
        # Some LAPACK builds report success and hand back NaN.
        if bool(torch.isfinite(s).all()):
            return u, s, vh
        reasons.append(f"{driver.__name__.strip('_')}: returned NaN or Inf")
    raise DecompositionError(
        f"SVD of a {matrix.shape[0]} x {matrix.shape[1]} matrix did not converge ({'; '.join(reasons)})"
    )


def leading_eigenvectors(make_gram: Callable[[], Tensor], rank: int) -> Tensor:
    """Leading `rank` eigenvectors [k, rank], largest first, of the Gram matrix that `make_gram` builds.

    The matrix is built anew for a retry because the solver overwrites it.

    Raises:
        DecompositionError: no driver converges.
    """
    reasons = []
    for driver in ("evr", "ev"):
        matrix = make_gram().numpy().T  # Fortran order: solved in place, upper triangle becomes lower
        size = matrix.shape[0]
        subset = [size - rank, size - 1] if driver == "evr" else None
        try:
            with blas_threads(size):
                _, vectors = scipy.linalg.eigh(
                    matrix,
                    lower=True,
                    subset_by_index=subset,
                    driver=driver,
                    overwrite_a=True,
                    check_finite=False,
                )
        except np.linalg.LinAlgError as error:
            reasons.append(f"{driver}: {error}")
            continue
        return torch.from_numpy(vectors[:, ::-1][:, :rank].copy(order="C"))
    raise DecompositionError(f"eigh of a {size} x {size} Gram matrix did not converge ({'; '.join(reasons)})")


def _rayleigh_ritz(matrix: Tensor, mode: int, basis: Tensor) -> _Triple:
    """SVD of `matrix` restricted to an orthonormal basis of its rows' (mode 0) or columns' (mode 1) space.

    Gives back orthonormal vectors and values accurate to rounding, which dividing by the square roots of Gram
    eigenvalues would not.
    """
    small = project(matrix, mode, basis)  # mode 0: [r, n], mode 1: [m, r]
    if mode == 1:
        q, triangle = torch.linalg.qr(small)  # [m, r], [r, r]
        u, s, vh = thin_svd(triangle)
        return q @ u, s, vh @ basis.T
    q, triangle = torch.linalg.qr(small.T)  # [n, r], [r, r]
    u, s, vh = thin_svd(triangle.T.contiguous())
    return basis @ u, s, vh @ q.T


def _is_small(rows: int, columns: int) -> bool:
    return rows * columns * min(rows, columns) <= DENSE_SVD_WORK


def leading_factor(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Leading `rank` left singular vectors [I_mode, rank] of an unfolding, float64, orthonormal.

    Where the unfolding has fewer than `rank` columns the basis is completed with arbitrary orthonormal
    vectors. Directions with singular values below about 1e-8 of the largest are arbitrary for a large
    unfolding.
    """
    size = tensor.shape[mode]
    columns = tensor.numel() // size
    if _is_small(size, columns):
        matrix = unfold(tensor, mode).double()
        if columns > size:  # right vectors, which nobody asked for, would take most of the time
            matrix = torch.linalg.qr(matrix.T, mode="r").R.T
        vectors = thin_svd(matrix)[0]
    elif size <= columns:
        return leading_eigenvectors(lambda: gram(tensor, mode), rank)
    else:
        matrix = unfold(tensor, mode).double().contiguous()
        right = leading_eigenvectors(lambda: gram(matrix, 1), min(rank, columns))
        vectors = torch.linalg.qr(matrix @ right)[0]
    if rank > vectors.shape[1]:
        return torch.linalg.qr(vectors, mode="complete")[0][:, :rank]
    return vectors[:, :rank].contiguous()


def singular_values(tensor: Tensor, mode: int = 0) -> Tensor:
    """All min(m, n) singular values of a matrix [m, n], or of the mode-n unfolding of a tensor.

    Returned in float64 on the CPU, descending. A small matrix goes through a real SVD. A large one goes
    through the eigenvalues of its Gram matrix (min(m,n)²·max(m,n)/2 multiply-adds, no copy of the tensor):
    values below about 1e-8 of the largest drown in rounding there and are returned as exactly zero, as are
    those of dead channels.

    Raises:
        TypeError, ValueError: anything but a finite, non-empty real tensor that has the mode.
        DecompositionError: no driver converges.
    """
    tensor = check_tensor(tensor, "singular_values: tensor", min_ndim=2)
    if not -tensor.ndim <= mode < tensor.ndim:
        raise ValueError(f"singular_values: mode must be in [{-tensor.ndim}, {tensor.ndim - 1}], got {mode}")
    mode %= tensor.ndim
    rows = tensor.shape[mode]
    columns = tensor.numel() // rows
    if _is_small(rows, columns):
        return thin_svd(unfold(tensor, mode).double())[1].clamp_min(0.0)
    if rows <= columns:
        squares = gram(tensor.contiguous(), mode)
    else:
        squares = gram(unfold(tensor, mode).contiguous(), 1)
    try:
        with blas_threads(squares.shape[0]):
            values = scipy.linalg.eigvalsh(squares.numpy(), lower=False, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise DecompositionError(f"eigenvalues of the Gram matrix of [{rows}, {columns}]: {error}") from error
    values = values[::-1].copy()
    values[values < values[0] * len(values) * np.finfo(np.float64).eps] = 0.0
    return torch.from_numpy(np.sqrt(values))


def truncated_svd64(matrix: Tensor, rank: int) -> _Triple:
    rows, columns = matrix.shape
    if _is_small(rows, columns):
        u, s, vh = thin_svd(matrix.double())
        return u[:, :rank], s[:rank], vh[:rank]
    mode = 0 if rows <= columns else 1
    return _rayleigh_ritz(matrix, mode, leading_eigenvectors(lambda: gram(matrix, mode), rank))


def truncated_svd(matrix: Tensor, rank: SupportsIndex) -> TruncatedSVD:
    """Best rank-r approximation `A ≈ U diag(S) Vh` of `matrix` [m, n] (Eckart and Young, 1936).

    Computed in float64 on the CPU; the three results have the dtype and device of `matrix`. Small matrices
    get a LAPACK SVD, exact to rounding. Large ones get the leading eigenvectors of the smaller Gram matrix
    followed by a Rayleigh-Ritz step, min(m,n)²·max(m,n)/2 multiply-adds and no float64 copy of the matrix;
    the part of A they can miss is below about 1e-8 of its largest singular value.

    A rank above min(m, n) is clipped with a warning.

    Raises:
        ValueError: NaN, Inf, an empty or non-2-D matrix or a rank below 1.
        DecompositionError: no driver converges.
    """
    checked = check_tensor(matrix, "truncated_svd: matrix", min_ndim=2, max_ndim=2).contiguous()
    rank = check_rank(rank, min(checked.shape), "truncated_svd: rank")
    u, s, vh = (part.to(matrix.device, matrix.dtype) for part in truncated_svd64(checked, rank))
    return TruncatedSVD(u.contiguous(), s, vh.contiguous())
