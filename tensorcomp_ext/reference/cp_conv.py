"""Oracle of the CP convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cp_conv2d(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolution with the dense weight of a CP decomposition.

    ``W[t,s,y,x] = sum_r factors[0][t,r] factors[1][s,r] factors[2][y,r] factors[3][x,r]``

    Args:
        x: input ``[N, S, H, W]``.
        factors: ``[T, R]``, ``[S, R]``, ``[kH, R]`` and ``[kW, R]``.
        bias: ``[T]`` or None.
        stride, dilation: int or pair.
        padding: int, pair (rows, columns), four ints (top, bottom, left, right), "same" or "valid".

    Returns:
        ``[N, T, H', W']``.

    Cost: ``R S T kH kW`` MACs for the weight and ``N H' W' kH kW S T`` for the
    convolution.

    Source: Hitchcock 1927; Lebedev et al. 2015 (convolutions).
    """
    if not isinstance(padding, (str, int)) and len(padding) == 4:
        top, bottom, left, right = padding
        x = F.pad(x, (left, right, top, bottom))
        padding = 0
    weight = torch.einsum("tr,sr,yr,xr->tsyx", *factors)  # [T, S, kH, kW]
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias[:, None, None].to(y.dtype)
