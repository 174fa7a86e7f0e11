"""Which memory format an image has, and how it is given another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of dimensions; others have no such format."""


def suggests_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """torch's rule for which format a result gets (c10/core/MemoryFormat.h), for 4 or 5 dimensions.

    Where channels or pixels are one, a tensor is contiguous in both formats and its strides alone tell.
    """
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[dim] == 0 or strides[dim] < least:
            return False
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * max(shape[dim], 1)
    return True


def memory_layout(x: Tensor) -> str:
    """ "contiguous", "channels_last" or "strided"."""
    last = CHANNELS_LAST.get(x.dim())
    if x.is_contiguous():
        both = last is not None and x.is_contiguous(memory_format=last)
        return "channels_last" if both and suggests_channels_last(x.shape, x.stride()) else "contiguous"
    return "channels_last" if last is not None and x.is_contiguous(memory_format=last) else "strided"


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` in channels-last, itself where it is, for 4 or 5 dimensions.

    One channel or one pixel is contiguous either way: then the strides change, not the memory.
    """
    made = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    if made.numel() == 0 or suggests_channels_last(made.shape, made.stride()):
        return made
    strides, stride = [0] * made.dim(), 1
    for dim in (1, *range(made.dim() - 1, 1, -1), 0):
        strides[dim], stride = stride, stride * made.shape[dim]
    return made if made.stride() == tuple(strides) else made.as_strided(made.shape, strides)


def applies_channels_last(weight: Tensor) -> bool:
    """Whether torch.nn's convolution with this dense weight answers in channels-last whatever its input."""
    return weight.dim() in CHANNELS_LAST and suggests_channels_last(weight.shape, weight.stride())
