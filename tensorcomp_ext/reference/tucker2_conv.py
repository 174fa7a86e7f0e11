"""Oracle of the Tucker-2 convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def tucker2_conv2d(
    x: Tensor,
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Three-stage Tucker-2 convolution, stage by stage.

    ``y[n,t] = bias[t] + sum_b factor_out[t,b] * conv2d(sum_s factor_in[s,a] x[n,s], core)[n,b]``

    Args:
        x: input ``[N, S, H, W]``.
        core: spatial core ``[R_out, R_in, kH, kW]``.
        factor_out: ``[T, R_out]``.
        factor_in: ``[S, R_in]``.
        bias: ``[T]`` or None.
        stride, dilation: int or pair.
        padding: int, pair (rows, columns), four ints (top, bottom, left, right), "same" or "valid".

    Returns:
        ``[N, T, H', W']``.

    Cost: ``N (H W S R_in + H' W' (kH kW R_in R_out + R_out T))`` MACs.

    Source: Tucker 1966; Kim et al. 2016 (Tucker-2 convolution).
    """
    if not isinstance(padding, (str, int)) and len(padding) == 4:
        top, bottom, left, right = padding
        x = F.pad(x, (left, right, top, bottom))
        padding = 0
    z = torch.einsum("nshw,sa->nahw", x, factor_in)  # [N, R_in, H, W]
    v = F.conv2d(z, core, stride=stride, padding=padding, dilation=dilation)  # [N, R_out, H', W']
    y = torch.einsum("nbhw,tb->nthw", v, factor_out)  # [N, T, H', W']
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias[:, None, None].to(y.dtype)
