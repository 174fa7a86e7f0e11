"""Oracle of the linear layer whose weight is a low-rank matrix plus a packed sparse one."""

from __future__ import annotations

import torch
from torch import Tensor

from .lowrank_sparse_weight import unpack_mask

SEGMENT = 1 << 16
"""Columns that 16 bits can tell apart; wider rows are cut into segments of so many."""


def lowrank_sparse_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    offsets: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer with the weight ``A B + S``, where S lies packed.

    ``y = (x Bᵀ) Aᵀ + x Sᵀ + bias``

    Args:
        x: input ``[..., n]``.
        a: ``[m, r]``.
        b: ``[r, n]``.
        values: entries of S that are kept, row by row and by ascending column, ``[nnz]``.
        offsets: where in ``values`` each segment of each row begins, and at last nnz; int32
            ``[m * segments + 1]``, where a row has ``segments = max(1, ceil(n / 65536))``.
        positions: either one bit an entry, uint8 ``[m, ceil(n / 8)]`` (see ``pack_mask``), or the columns
            of the values, counted from the beginning of their segment, int16 ``[nnz]``, read as unsigned.
        bias: ``[m]`` or None.

    Returns:
        ``[..., m]``.

    Cost: ``r (m + n) + nnz`` MACs a row of x.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """
    rows, columns = coordinates(offsets, positions, a.shape[0], b.shape[1])
    entries = (rows * b.shape[1] + columns).long()
    flat = values.new_zeros(a.shape[0] * b.shape[1]).index_put((entries,), values)
    sparse = flat.reshape(a.shape[0], b.shape[1])
    z = torch.einsum("...n,rn->...r", x, b)  # [..., r]
    y = torch.einsum("...r,mr->...m", z, a) + torch.einsum("...n,mn->...m", x, sparse)  # [..., m]
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)


def coordinates(offsets: Tensor, positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every packed value, int64, in their order."""
    if positions.dtype == torch.uint8:
        row, column = unpack_mask(positions, columns).nonzero(as_tuple=True)
        return row, column
    segments = segments_of(columns)
    counts = offsets[1:].long() - offsets[:-1].long()
    segment = torch.repeat_interleave(
        torch.arange(rows * segments, device=offsets.device), counts, output_size=positions.shape[0]
    )
    column = positions.long() & (SEGMENT - 1)
    return segment // segments, segment % segments * SEGMENT + column


def segments_of(columns: int) -> int:
    """Segments that a row of so many columns has."""
    return max(1, -(-columns // SEGMENT))
