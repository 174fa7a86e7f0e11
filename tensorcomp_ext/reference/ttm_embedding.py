"""Oracle of the embedding whose table is a tensor-train or tensor-ring matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ttm_embedding(
    indices: Tensor, cores: Sequence[Tensor], num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    """Rows of a table that is never formed.

    ``y[n, j_1 ... j_K] = sum_r prod_k cores[k][r_{k-1}, i_k, j_k, r_k]`` with ``i_1 ... i_K`` the digits of
    ``indices[n]``, the first the most significant. The first rank and the last are one index: of size 1, or
    closing the ring.

    Args:
        indices: any shape, int64 or int32, each in ``[0, num_embeddings)``.
        cores: K tensors ``[r, vocab_k, dim_k, r']``.
        num_embeddings: rows of the table, at most the product of all ``vocab_k``.
        padding_idx: index of a row of zeros, or None.

    Returns:
        ``[*indices.shape, dim]``, ``dim`` the product of all ``dim_k``.

    Cost: ``sum_k r_0 dim_1 ... dim_k r_{k-1} r_k`` MACs an index.

    Source: Hrinchuk et al. 2020; Yin et al. 2021.
    """
    flat = indices.reshape(-1).long()
    hidden = None if padding_idx is None else (flat == padding_idx).reshape(-1, 1, 1, 1)
    product: Tensor | None = None
    below = 1
    for core in cores:
        below *= core.shape[1]
    for core in cores:
        below //= core.shape[1]
        digits = flat // below  # more than a digit only where an index is out of range: then select complains
        flat = flat - digits * below
        slices = core.movedim(1, 0).index_select(0, digits)  # [n, r, dim_k, r']
        if hidden is not None:
            # Here and not in the row: no gradient passes either, where what it would meet is not finite.
            slices = slices.masked_fill(hidden, 0)
        if product is None:
            product = slices
        else:
            # [n, r_0, dim_1 ... dim_{k-1}, r] x [n, r, dim_k, r']
            product = torch.einsum("zapb,zbqc->zapqc", product, slices).flatten(2, 3)
    assert product is not None
    rows = torch.einsum("zapa->zp", product)
    return rows.reshape(*indices.shape, rows.shape[-1])
