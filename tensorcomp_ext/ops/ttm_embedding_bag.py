"""Sums and means of rows of a TTM or TR-matrix embedding, bag by bag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .ttm_embedding import check_indices, checked_rows, checked_sizes, ttm_embedding

_NAME = "ttm_embedding_bag"


def ttm_embedding_bag(
    indices: Tensor,
    cores: Sequence[Tensor],
    offsets: Tensor | None = None,
    *,
    num_embeddings: int,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Reduced rows of a table in tensor-train or tensor-ring matrix form, without forming the table.

    The result equals ``torch.nn.functional.embedding_bag(indices, table, offsets, ...)`` with the dense table
    of the cores, and so do the gradients of the cores and of the weights. Rows are computed once for the
    different indices of a call, on CUDA for every index; of the table nothing else is made.

    Args:
        indices: ``[bags, size]`` for bags of one size, or ``[n]`` with ``offsets``; int64 or int32.
        cores, num_embeddings, backend: as in :func:`ttm_embedding`.
        offsets: ``[bags]``, the place in ``indices`` where each bag begins, in the indices' dtype.
        mode: "sum" or "mean".
        per_sample_weights: a factor for each index, of the indices' shape; for mode "sum" only.
        padding_idx: an index that counts in no bag; a negative one counts from the end.
        include_last_offset: ``offsets`` has one entry more, the end of the last bag.

    Returns:
        ``[bags, dim]``; an empty bag is zero.

    Cost: as :func:`ttm_embedding` for the different indices, and ``dim`` additions an index.

    Raises:
        IndexError, ValueError, TypeError: as :func:`ttm_embedding`, and where the bags do not fit. On CUDA
            and in compiled code, which read no offsets, those are torch's to refuse.

    Source: as :func:`ttm_embedding`.
    """
    checked_sizes(indices, cores, _NAME)
    padding = checked_rows(cores, num_embeddings, padding_idx, _NAME)
    flat, offsets, weights = _checked_bags(
        indices, offsets, mode, per_sample_weights, include_last_offset, cores[0]
    )
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(flat) or flat.is_cuda:
        # How many indices differ is no size that a graph could have, and a device would have to tell it.
        different, places = flat, torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device)
    else:
        check_indices(indices, num_embeddings, _NAME)
        if indices.dim() == 1 and not torch._C._functorch.is_batchedtensor(offsets):
            _check_places(offsets, flat.numel())
            if include_last_offset:
                # torch's float64 sums what is behind the end into the last bag, its float32 does not.
                end = int(offsets[-1])
                flat, weights = flat[:end], None if weights is None else weights[:end]
        different, places = torch.unique(flat, return_inverse=True)
    rows = ttm_embedding(
        different, cores, num_embeddings=num_embeddings, padding_idx=padding_idx, backend=backend
    )
    if len(offsets) == int(include_last_offset):
        return rows[:0]  # torch's kernels crash without a bag
    # The padding row is zero: a sum leaves it out as it is.
    sums = F.embedding_bag(
        places.to(offsets.dtype),
        rows,
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
    )
    if mode == "sum":
        return sums
    counts = _counts(flat != padding, offsets, include_last_offset)
    return sums / counts.clamp(min=1).to(sums.dtype).unsqueeze(1)


def _check_places(offsets: Tensor, count: int) -> None:
    """Raise ``ValueError`` unless the bags begin one after the other within ``count`` indices."""
    if len(offsets) == 0:
        return
    if offsets[0] != 0:
        raise ValueError(f"{_NAME}: offsets must begin with 0, got {int(offsets[0])}")
    back = (offsets[1:] < offsets[:-1]).nonzero()
    if len(back):
        at = int(back[0])
        raise ValueError(
            f"{_NAME}: offsets must not decrease, got {int(offsets[at])} and then {int(offsets[at + 1])}"
        )
    if offsets[-1] > count:
        raise ValueError(
            f"{_NAME}: offsets must be at most {count}, the number of indices, got {int(offsets[-1])}"
        )


def _counts(counted: Tensor, offsets: Tensor, include_last_offset: bool) -> Tensor:
    """How many of the indices in each bag count, ``[bags]``."""
    before = F.pad(counted.cumsum(0), (1, 0))  # [n + 1]
    if not include_last_offset:
        offsets = F.pad(offsets, (0, 1), value=counted.numel())
    at = before[offsets.long()]
    return at[1:] - at[:-1]


def _checked_bags(
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    core: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flat indices, where their bags begin, and their weights, after checking all but values."""
    if mode not in ("sum", "mean"):
        raise ValueError(f"{_NAME}: mode must be 'sum' or 'mean', got {mode!r}")
    if per_sample_weights is not None:
        if mode != "sum":
            raise ValueError(f"{_NAME}: per_sample_weights go with mode 'sum', got {mode!r}")
        if per_sample_weights.shape != indices.shape:
            raise ValueError(
                f"{_NAME}: per_sample_weights must have the shape {list(indices.shape)} of indices, "
                f"got {list(per_sample_weights.shape)}"
            )
        if per_sample_weights.dtype != core.dtype:
            raise TypeError(
                f"{_NAME}: per_sample_weights must have the cores' dtype {core.dtype}, "
                f"got {per_sample_weights.dtype}"
            )
        per_sample_weights = per_sample_weights.reshape(-1)
    flat = indices.reshape(-1)
    if indices.dim() == 2:
        if offsets is not None:
            raise ValueError(
                f"{_NAME}: offsets must be None for indices [bags, size], got {list(offsets.shape)}"
            )
        bags, size = indices.shape
        count = bags + include_last_offset
        return flat, torch.arange(count, device=flat.device, dtype=flat.dtype) * size, per_sample_weights
    if indices.dim() != 1:
        raise ValueError(f"{_NAME}: indices must be [bags, size] or [n], got {list(indices.shape)}")
    if offsets is None:
        raise ValueError(f"{_NAME}: offsets must be given for indices [n]")
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or (include_last_offset and len(offsets) == 0):
        given = list(offsets.shape) if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ValueError(
            f"{_NAME}: offsets must be [bags{' + 1' if include_last_offset else ''}], got {given}"
        )
    if offsets.dtype != indices.dtype:
        raise TypeError(f"{_NAME}: offsets must have the indices' dtype {indices.dtype}, got {offsets.dtype}")
    if offsets.device != indices.device:
        raise ValueError(
            f"{_NAME}: offsets must be on the indices' device {indices.device}, got {offsets.device}"
        )
    return flat, offsets, per_sample_weights
