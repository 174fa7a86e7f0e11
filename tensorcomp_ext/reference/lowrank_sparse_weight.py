"""Oracle of a weight that is a low-rank matrix and a sparse one."""

from __future__ import annotations

import torch
from torch import Tensor


def lowrank_sparse_weight(a: Tensor, b: Tensor, values: Tensor, mask: Tensor, masking: bool) -> Tensor:
    """The dense weight: a low-rank matrix with a sparse part added to it, or in place of some of it.

    ``W = A B + M * S``, or ``W = (1 - M) * (A B) + M * S`` where ``masking``. What the mask hides is not
    looked at: it may be anything, and no gradient reaches it.

    Args:
        a: ``[m, r]``.
        b: ``[r, n]``.
        values: S, ``[m, n]``.
        mask: M, bool ``[m, n]``, or one bit an entry, uint8 ``[m, ceil(n / 8)]``.
        masking: whether the sparse part replaces the low-rank one.

    Returns:
        ``[m, n]``.

    Cost: ``m r n`` MACs.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """
    kept = unpack_mask(mask, values.shape[1]) if mask.dtype == torch.uint8 else mask
    low = torch.einsum("mr,rn->mn", a, b)
    return torch.where(kept, values, low) if masking else low + torch.where(kept, values, 0)


def pack_mask(mask: Tensor) -> Tensor:
    """One bit an entry: bit ``j % 8`` of byte ``j // 8`` of a row is column j; a last byte is filled with 0.

    Args:
        mask: bool ``[..., n]``.

    Returns:
        uint8 ``[..., ceil(n / 8)]``.

    Raises:
        TypeError: a mask of another dtype.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"pack_mask: mask must be a bool tensor [..., n], got {given}")
    n = mask.shape[-1]
    whole = torch.nn.functional.pad(mask.to(torch.uint8), (0, -n % 8))
    # The counts are spelled out: -1 is ambiguous where a mode is empty.
    octets = whole.reshape(*mask.shape[:-1], (n + 7) // 8, 8)
    return (octets << _places(mask)).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """The bool mask ``[..., columns]`` of :func:`pack_mask`'s bytes.

    Raises:
        TypeError: bytes of another dtype.
        ValueError: another number of bytes a row than ``ceil(columns / 8)``.
    """
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        given = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"unpack_mask: bits must be a uint8 tensor [..., ceil(columns / 8)], got {given}")
    if bits.dim() == 0 or bits.shape[-1] != (columns + 7) // 8:
        raise ValueError(
            f"unpack_mask: bits must be [..., ceil(columns / 8)] with ceil(columns / 8) = "
            f"{(columns + 7) // 8}, got {list(bits.shape)}"
        )
    octets = (bits.unsqueeze(-1) >> _places(bits)) & 1
    return octets.bool().flatten(-2)[..., :columns]


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
