"""Unfoldings of a tensor, read block by block in float64.

A weight may have billions of entries, so nothing here holds a second tensor of its size: every product with
an unfolding casts one block at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import SupportsIndex

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

from tensorcomp_ext._warnings import warn

BLOCK_ELEMENTS = 1 << 21  # 16 MiB of float64: wide enough for BLAS to run at full speed


class DecompositionError(RuntimeError):
    """No LAPACK driver converged. The message has no layer name; callers put it in front."""


def check_tensor(tensor: Tensor, name: str, *, min_ndim: int, max_ndim: int | None = None) -> Tensor:
    """Return `tensor` detached and on the CPU, in its own dtype and layout.

    Raises:
        TypeError: it is no real floating-point tensor.
        ValueError: its number of dimensions is wrong, it is empty, or it holds NaN or Inf.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be real floating-point, got {tensor.dtype}")
    shape = list(tensor.shape)
    if tensor.ndim < min_ndim or (max_ndim is not None and tensor.ndim > max_ndim):
        if max_ndim is None:
            wanted = f"at least {min_ndim}"
        else:
            wanted = str(min_ndim) if min_ndim == max_ndim else f"{min_ndim} to {max_ndim}"
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {shape}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {shape}")
    tensor = tensor.detach().to("cpu")
    # The extremes carry NaN and Inf along and, unlike isfinite, need no mask of the tensor's size.
    low, high = torch.aminmax(tensor)
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise ValueError(f"{name} contains NaN or Inf")
    return tensor


def check_rank(rank: SupportsIndex, limit: int, name: str) -> int:
    """Return `rank` as an int, clipped to `limit` with a warning.

    Raises:
        ValueError: it is below 1.
        TypeError: it is no integer.
    """
    if isinstance(rank, bool):
        raise TypeError(f"{name} must be an int, got {rank}")
    try:
        value = operator.index(rank)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(rank).__name__}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > limit:
        warn(f"{name} {value} exceeds {limit}; clipped to {limit}")
        return limit
    return value


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding `[I_mode, prod of the others]`, the other modes in order, last index fastest.

    Same column order as `tensorly.unfold`.

    Raises:
        ValueError: a mode the tensor does not have.
    """
    if not -tensor.ndim <= mode < tensor.ndim:
        raise ValueError(f"unfold: mode must be in [{-tensor.ndim}, {tensor.ndim - 1}], got {mode}")
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def _split(tensor: Tensor, mode: int) -> Tensor:
    """View of a contiguous tensor as `[product before, I_mode, product after]`."""
    before = math.prod(tensor.shape[:mode])
    return tensor.reshape(before, tensor.shape[mode], -1)


def _blocks(tensor: Tensor, mode: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield `(slice before, slice after, block [I_mode, columns] float64)` covering the mode-n unfolding."""
    view = _split(tensor, mode)
    before, size, after = view.shape
    step_before = max(1, min(before, BLOCK_ELEMENTS // (size * after)))
    step_after = max(1, min(after, BLOCK_ELEMENTS // size))
    for i in range(0, before, step_before):
        for j in range(0, after, step_after):
            part = view[i : i + step_before, :, j : j + step_after].movedim(1, 0)
            block = torch.empty(part.shape, dtype=torch.float64).copy_(part)
            yield slice(i, i + step_before), slice(j, j + step_after), block.reshape(size, -1)


def gram(tensor: Tensor, mode: int) -> Tensor:
    """`A Aᵀ` of the mode-n unfolding A, float64; only the upper triangle is set, the rest is zero.

    I²·n/2 multiply-adds for an I × n unfolding; memory: the result and one block.
    """
    size = tensor.shape[mode]
    total = torch.zeros(size, size, dtype=torch.float64)
    # BLAS sees the C-ordered arrays transposed, so its "lower" is our upper triangle.
    out = total.numpy().T
    for _, _, block in _blocks(tensor, mode):
        dsyrk(1.0, block.numpy().T, beta=1.0, c=out, trans=1, lower=1, overwrite_c=1)
    return total


def project(tensor: Tensor, mode: int, factor: Tensor) -> Tensor:
    """Mode-n product `A ×_mode factorᵀ` in float64 with factor `[I_mode, R]`: mode n shrinks to R.

    numel·R multiply-adds; memory: the result and one block.
    """
    before, _, after = _split(tensor, mode).shape
    rank = factor.shape[1]
    out = torch.empty(before, rank, after, dtype=torch.float64)
    for rows, columns, block in _blocks(tensor, mode):
        target = out[rows, :, columns]
        product = (factor.T @ block).view(rank, target.shape[0], target.shape[2])
        target.copy_(product.movedim(0, 1))
    return out.view(*tensor.shape[:mode], rank, *tensor.shape[mode + 1 :])


def expand(core: Tensor, mode: int, factor: Tensor) -> Tensor:
    """Mode-n product `C ×_mode factor` in float64 with factor `[I_mode, R]`: mode n grows from R to I."""
    return project(core, mode, factor.T)


def squared_norm(tensor: Tensor) -> float:
    """`‖A‖²` accumulated in float64, a block at a time."""
    parts = (part.double() for part in tensor.reshape(-1).split(BLOCK_ELEMENTS))
    return sum(float(torch.dot(part, part)) for part in parts)


def residual_of_product(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """`‖A − left @ right‖²` in float64, by blocks of rows: a difference of norms would cancel where it is
    small.

    A is [m, n], left [m, q], right [q, n]; m·n·q multiply-adds.
    """
    step = max(1, BLOCK_ELEMENTS // matrix.shape[1])
    return sum(
        squared_norm(matrix[i : i + step].double() - left[i : i + step] @ right)
        for i in range(0, matrix.shape[0], step)
    )
